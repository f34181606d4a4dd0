"""Write the figures and the code of the docs from where they come from, so that nobody types a number twice.

A page marks the place; what is between the marks is replaced, `--check` only compares:

    <!-- table packages/msam/reproduce/results/digits.json#runs columns="method, accuracy:.3f as test accuracy" -->
    <!-- end -->

    SAM reaches <!-- value packages/msam/reproduce/results/digits.json#best.accuracy:.1% -->97.3%<!-- end -->.

    <!-- code packages/core-tensor/src/core_tensor/ops/bit_packing/reference.py#pack_bits -->
    <!-- end -->

The `#` of code is followed by the name of a definition (Python or C++), else a path of keys and indices into the JSON;
`rows.method=sam.accuracy` chooses the row of a list whose `method` is `sam`. A table is a list of objects, or an
object of objects whose keys become the first column, `name`. `columns` chooses and orders keys (dots go deeper), with
a format after a colon and a heading after `as`; without it every key of the first row is a column.
"""

import argparse
import ast
import functools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workspace import ROOT

_BLOCK = re.compile(
    r"""(?P<begin><!--\ (?P<kind>table|value|code)\ (?P<file>[^#\s]+)(?:\#(?P<path>[^\s:]*))?(?::(?P<format>\S+))?
        (?:\ columns="(?P<columns>[^"]*)")?\ -->).*?(?P<end><!--\ end\ -->)""",
    re.DOTALL | re.VERBOSE,
)
_COLUMN = re.compile(r"^(?P<key>[^:]+?)(?::(?P<format>\S+))?(?: as (?P<title>.+))?$")


def pages(root: Path = ROOT) -> Iterator[Path]:
    """Every Markdown page that may hold figures."""
    yield root / "README.md"
    yield from sorted(root.glob("docs/**/*.md"))
    yield from sorted(root.glob("packages/*/README.md"))


def look_up(value: Any, path: str, where: str) -> Any:
    """Follow a dotted path of keys and list indices.

    Args:
        value: Parsed JSON.
        path: Such as `runs.0.accuracy` or `runs.method=sam.accuracy`; empty for the whole.
        where: What to name in an error.

    Raises:
        ValueError: If a key is missing.
    """
    for key in filter(None, path.split(".")):
        try:
            if isinstance(value, list) and "=" in key:
                name, _, wanted = key.partition("=")
                value = next(row for row in value if str(row[name]) == wanted)
            else:
                value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
            raise ValueError(f"{where}: no {key!r} on the path {path!r}") from error
    return value


def show(value: Any, form: str | None) -> str:
    """A figure as text: four significant digits unless a format is given; null is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if form is not None:
        return format(value, form)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Any, columns: str | None, where: str) -> str:
    """A Markdown table of a list of objects or an object of objects.

    Args:
        rows: The objects.
        columns: The choice of columns as in the mark, or None for all.
        where: What to name in an error.

    Raises:
        ValueError: If there is no row, a row is no object, or a column is written wrong.
    """
    if isinstance(rows, Mapping):
        rows = [{"name": name, **row} if isinstance(row, Mapping) else row for name, row in rows.items()]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{where}: expected objects to make a table of")
    chosen = []
    for text in re.split(r",\s*", columns) if columns else rows[0]:
        match = _COLUMN.match(text.strip())
        if match is None:
            raise ValueError(f"{where}: expected a column such as 'key:.2f as heading', got {text!r}")
        chosen.append((match["key"], match["format"], match["title"] or match["key"].replace("_", " ")))
    lines = ["| " + " | ".join(title for _, _, title in chosen) + " |"]
    right = [isinstance(look_up(rows[0], key, where), int | float) for key, _, _ in chosen]
    lines.append("|" + "|".join(" --: " if is_number else " --- " for is_number in right) + "|")
    cells = ([show(look_up(row, key, where), form) for key, form, _ in chosen] for row in rows)
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join(lines)


def definition(path: Path, name: str, where: str) -> str:
    """The source of one definition as a fenced block.

    Args:
        path: A Python or C++ file.
        name: A function, class or assigned name at the top level; in C++ a function.
        where: What to name in an error.

    Raises:
        ValueError: If the file has no such definition.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for node in ast.parse(text).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            if name in (getattr(target, "name", getattr(target, "id", None)) for target in targets):
                first = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", ()))])
                lines = text.splitlines()[first - 1 : node.end_lineno]
                return "```python\n" + "\n".join(lines) + "\n```"
    elif match := re.search(rf"^\S.*\b{re.escape(name)}\((?:.|\n)*?^}}$", text, re.MULTILINE):
        return f"```cpp\n{match[0]}\n```"
    raise ValueError(f"{where}: no definition of {name!r}")


def rendered(text: str, root: Path, page: str) -> str:
    """The page with every marked figure made anew.

    Args:
        text: The page.
        root: Where the paths of the marks begin.
        page: Its name, for errors.

    Raises:
        ValueError: If a file or a key is missing.
    """

    @functools.cache
    def results(file: str) -> Any:
        try:
            return json.loads((root / file).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{page}: expected JSON in {file} ({error})") from error

    def block(match: re.Match[str]) -> str:
        file, path, where = match["file"], match["path"] or "", f"{page}: {match['file']}"
        if match["kind"] == "code":
            body = f"\n{definition(root / file, path, where)}\n"
        elif match["kind"] == "table":
            body = f"\n{table(look_up(results(file), path, where), match['columns'], where)}\n"
        else:
            body = show(look_up(results(file), path, where), match["format"])
        return f"{match['begin']}{body}{match['end']}"

    return _BLOCK.sub(block, text)


def main() -> int:
    """Rewrite the pages, or say which are out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="only say which pages are out of date")
    check = parser.parse_args().check
    stale = []
    for page in pages():
        name = page.relative_to(ROOT).as_posix()
        text = page.read_text(encoding="utf-8")
        try:
            fresh = rendered(text, ROOT, name)
        except ValueError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
        if fresh != text:
            stale.append(name)
            if not check:
                page.write_text(fresh, encoding="utf-8")
    verb = "out of date, run tools/report.py" if check else "rewritten"
    print("\n".join(f"{name}: {verb}" for name in stale) or "every figure is what reproduce/ wrote")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
