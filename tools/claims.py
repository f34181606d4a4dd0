"""One report over all packages: what each paper claims, what was measured here, and whether it holds.

    python tools/claims.py            docs/claims.md and site-independent out/claims.html from reproduce/results
    python tools/claims.py --check    only compare docs/claims.md
    python tools/claims.py --quick    run every script that has a quick form (resumable), report on that

`packages/<name>/reproduce/claims.toml` holds the rows:

    [[claim]]
    text = "Micro-batches find flatter minima than SAM."
    source = "2302.09693, abstract"
    measured = "top eigenvalue {digits#table.method=msam.lambda_max:.2f} ± {digits#table.method=msam.lambda_max_se:.2f}"
    peer = "SAM {digits#table.method=sam.lambda_max:.2f}"
    seeds = "{digits#table.method=msam.seeds}"
    holds = "digits#table.method=msam.lambda_max < digits#table.method=sam.lambda_max"
    in_part = "digits#table.method=msam.lambda_max < digits#table.method=sgd.lambda_max"

A reference is `<file without .json>#<path of keys>` (see `tools/report.py`), with a format after a colon inside
braces. `holds` and `in_part` compare numbers and references (`<`, `<=`, `+`, `*`, `and` and the like); if neither is
true, the claim does not show at our scale, and `note` should say why. Nobody types a verdict.
"""

import argparse
import ast
import functools
import html
import json
import operator
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import look_up, show
from workspace import ROOT, packages

PAGE = Path("docs/claims.md")
QUICK = Path("out/reproduce-quick")
VERDICTS = ("holds", "holds in part", "does not show at this scale")
_REFERENCE = r"[\w-]+#[\w.+=-]+"
_NAME = r"[\w-]+#[^{}:]+"  # in braces a name may hold spaces
_HEAD = """# Claims

What the papers' abstracts claim and what was measured here. A verdict follows from the figures by a rule in the
package's `reproduce/claims.toml`; the figures come from its `reproduce/results`.
"""
_HTML_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto }
td, th { border-bottom: 1px solid #ccc; padding: .4rem .6rem; text-align: left; vertical-align: top }
</style>
"""


@dataclass(frozen=True)
class Row:
    """One claim with its figures filled in."""

    package: str
    text: str
    source: str
    measured: str
    peer: str
    seeds: str
    verdict: str
    note: str


class Results:
    """The JSON files of one package's results, read when a reference asks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read = functools.cache(lambda name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))

    def value(self, reference: str) -> Any:
        """What a reference names.

        Raises:
            ValueError: If there is no such file or key.
        """
        name, _, path = reference.partition("#")
        try:
            return look_up(self.read(name), path, f"{self.folder.parents[1].name} {reference}")
        except OSError as error:
            raise ValueError(f"{self.folder / name}.json: {error.strerror}") from error

    def fill(self, text: str) -> str:
        """Text with every `{reference:format}` replaced."""

        def figure(match: re.Match[str]) -> str:
            return show(self.value(match[1]), match[2])

        return re.sub(rf"\{{({_NAME})(?::([^}}]+))?\}}", figure, text)

    def true(self, rule: str) -> bool:
        """Whether a comparison of references and numbers holds.

        Raises:
            ValueError: If it is anything else.
        """
        literal = re.sub(_REFERENCE, lambda match: repr(self.value(match[0])), rule)
        return bool(_evaluate(ast.parse(literal, mode="eval").body, rule))


_OPERATIONS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
}


def _evaluate(node: ast.expr, rule: str) -> Any:
    """Arithmetic, comparisons, `and` and `or`, nothing else."""
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_evaluate(inner, rule)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_evaluate(left, rule), _evaluate(right, rule))
        case ast.Compare(left=first, ops=ops, comparators=rest) if all(type(op) in _OPERATIONS for op in ops):
            values = [_evaluate(part, rule) for part in (first, *rest)]
            return all(_OPERATIONS[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
        case ast.BoolOp(op=op, values=values):
            return (all if isinstance(op, ast.And) else any)(_evaluate(value, rule) for value in values)
    raise ValueError(f"{rule}: expected a comparison of figures")


def rows(root: Path, folder_of: Callable[[str], Path], *, partial: bool = False) -> list[Row]:
    """Every claim of every package.

    Args:
        root: Root of the workspace.
        folder_of: Folder of the results of a package.
        partial: Whether claims whose results are absent are left out, as those of scripts without a quick form are.
    """
    found = []
    for name in packages(root):
        path = root / "packages" / name / "reproduce" / "claims.toml"
        if not path.exists():
            continue
        results = Results(folder_of(name))
        for claim in tomllib.loads(path.read_text(encoding="utf-8"))["claim"]:
            try:
                found.append(judged(name, claim, results))
            except ValueError:
                if not partial:
                    raise
    return found


def judged(package: str, claim: Mapping[str, str], results: Results) -> Row:
    """A claim with its figures and the verdict that follows from them."""
    true = [rule in claim and results.true(claim[rule]) for rule in ("holds", "in_part")]
    verdict = VERDICTS[true.index(True) if any(true) else 2]
    cells = {key: results.fill(str(claim.get(key, "–"))) for key in ("measured", "peer", "seeds")}
    note = results.fill(claim.get("note", ""))
    return Row(package, claim["text"], claim["source"], **cells, verdict=verdict, note=note)


def as_markdown(found: Sequence[Row], head: str) -> str:
    """The report as a page with a table per package."""
    parts = [head]
    for name in dict.fromkeys(row.package for row in found):
        parts.append(f"## {name}\n")
        parts.append("| claim | measured here | beside it | seeds | verdict |\n| --- | --- | --- | --- | --- |")
        for row in (row for row in found if row.package == name):
            verdict = f"**{row.verdict}**" + (f": {row.note}" if row.note else "")
            cells = (f"{row.text} ({row.source})", row.measured, row.peer, row.seeds, verdict)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def as_html(found: Sequence[Row], title: str) -> str:
    """The report as one file that any browser shows."""
    colors = dict(zip(VERDICTS, ("#1b7f3b", "#9a6b00", "#8a1f1f"), strict=True))
    lines = [f"{_HTML_HEAD}<title>{title}</title><h1>{title}</h1>"]
    for name in dict.fromkeys(row.package for row in found):
        heads = "".join(f"<th>{head}</th>" for head in ("claim", "measured here", "beside it", "seeds", "verdict"))
        lines.append(f"<h2>{name}</h2><table><tr>{heads}</tr>")
        for row in (row for row in found if row.package == name):
            cells = [f"{row.text} ({row.source})", row.measured, row.peer, row.seeds]
            shown = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            verdict = f'<b style="color:{colors[row.verdict]}">{row.verdict}</b> {html.escape(row.note)}'
            lines.append(f"<tr>{shown}<td>{verdict}</td></tr>")
        lines.append("</table>")
    return "\n".join(lines) + "\n"


def run_quick(root: Path, out: Path) -> tuple[dict[str, float], list[str]]:
    """Run every script that has a `--quick`; what an earlier call has finished at this commit is not run again.

    Returns:
        Seconds of every script, and the scripts that failed, such as those whose data this machine does not have.
    """
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
    took, failed = {}, []
    for name in packages(root):
        for script in sorted((root / "packages" / name / "reproduce").glob("[!_]*.py")):
            beside = sorted(script.parent.glob("_*.py"))  # where scripts share their options
            if not any('"--quick"' in part.read_text(encoding="utf-8") for part in (script, *beside)):
                print(f"{name} {script.name}: has no quick form; its claims are left out", flush=True)
                continue
            folder = out / name
            folder.mkdir(parents=True, exist_ok=True)
            done = folder / f".{script.stem}.done"
            if not (done.exists() and json.loads(done.read_text())["commit"] == commit):
                print(f"{name} {script.name} --quick", flush=True)
                begin = time.monotonic()
                command = [sys.executable, str(script), "--quick", "-o", str(folder)]
                if subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode:
                    failed.append(f"{name} {script.name}")
                    continue
                done.write_text(json.dumps({"commit": commit, "seconds": time.monotonic() - begin}))
            took[f"{name} {script.name}"] = json.loads(done.read_text())["seconds"]
    return took, failed


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write or check the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the page with the results, write nothing")
    parser.add_argument("--quick", action="store_true", help="run all scripts with --quick and report on their figures")
    options = parser.parse_args(arguments)
    failed: list[str] = []
    try:
        if options.quick:
            out = root / QUICK
            took, failed = run_quick(root, out)
            found = rows(root, lambda name: out / name, partial=True)
            machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
            head = (
                "# Claims, quick\n\nA small form of every script, which shows that all of it runs and little more "
                f"(`uvx nox -s reproduce -- --quick`): {len(took)} scripts in {sum(took.values()) / 60:.0f} minutes on "
                f"{machine}.\n"
            )
            head += f"\nFailed, their claims left out: {', '.join(failed)}.\n" if failed else ""
            pages = {out / "claims.md": as_markdown(found, head), out / "claims.html": as_html(found, "Claims, quick")}
        else:
            found = rows(root, lambda name: root / "packages" / name / "reproduce" / "results")
            pages = {root / PAGE: as_markdown(found, _HEAD)}
            if not options.check:
                pages[root / "out" / "claims.html"] = as_html(found, "Claims")
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    if options.check:
        stale = [str(path) for path, text in pages.items() if not path.exists() or path.read_text() != text]
        print(f"stale: {', '.join(stale)}: run tools/claims.py" if stale else "every claim is what reproduce/ wrote")
        return bool(stale)
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
