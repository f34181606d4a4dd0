"""Check that everything a paper map names exists.

A paper map is a Markdown table in `docs/packages/<package>.md` that takes a reader from an equation to its code and
its test. Its header names a column that begins with `Function` and one that begins with `Test`. In these two columns
every word in backticks must exist: a function as the dotted path of a module or an attribute (with or without the
package's own name in front), a test as `file.py::name`, `file.py` or `name`, under the package's `tests/`.
"""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workspace import ROOT


@dataclass(frozen=True)
class Entry:
    """One name in a paper map.

    Attributes:
        line: Line of the page, counted from one.
        column: `function` or `test`.
        name: The text in backticks.
    """

    line: int
    column: str
    name: str


def entries(text: str) -> Iterator[Entry]:
    """The names in the paper maps of a page, in order."""
    columns: dict[int, str] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.lstrip().startswith("|"):
            columns = None
            continue
        # A bar inside a code span or a formula is no border of a cell.
        cells = re.split(r"(?<!\\)\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", re.sub(r"\$[^$]*\$", "", line).strip().strip("|"))
        if columns is None:
            kinds = {i: kind for i, c in enumerate(cells) for kind in ("function", "test") if is_headed(c, kind)}
            columns = kinds if set(kinds.values()) == {"function", "test"} else {}
        for i, kind in columns.items():
            if i < len(cells):
                for name in re.findall(r"`([^`]+)`", cells[i]):
                    yield Entry(number, kind, name.strip().removesuffix("()"))


def is_headed(cell: str, kind: str) -> bool:
    """Whether a header cell heads the column of functions or of tests."""
    return cell.strip(" *").lower().startswith(kind)


def has_function(name: str, package: str) -> bool:
    """Whether a dotted path leads to a module or an attribute, from the top or from the package's module."""
    return any(_resolves(path) for path in (name, f"{package.replace('-', '_')}.{name}"))


def _resolves(path: str) -> bool:
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    for cut in range(len(parts), 0, -1):
        module = ".".join(parts[:cut])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, something it needs is not
            continue
        for attribute in parts[cut:]:
            if not hasattr(found, attribute):
                return attribute in getattr(found, "__dataclass_fields__", {})
            found = getattr(found, attribute)
        return True
    return False


def has_test(name: str, tests: Path) -> bool:
    """Whether `file.py::name`, `file.py` or `name` is a test under a folder."""
    file, _, test = name.partition("::") if ".py" in name else ("", "", name)
    relative = file.removeprefix("tests/")
    found = [path for path in tests.rglob("*.py") if not file or path.relative_to(tests).as_posix().endswith(relative)]
    if not test:
        return bool(found)
    wanted = test.split("[")[0].split("::")[-1]
    return any(wanted in _definitions(path) for path in found)


def _definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def problems(root: Path = ROOT) -> list[str]:
    """One line for every name that a paper map promises and that does not exist, and for every page without a map."""
    found = []
    for page in sorted((root / "docs" / "packages").glob("*.md")):
        where, package = page.relative_to(root).as_posix(), page.stem
        listed = list(entries(page.read_text(encoding="utf-8")))
        if not listed and package != "core-tensor":  # core-tensor follows no paper
            found.append(f"{where}: expected a table with the columns Function and Test")
        tests = root / "packages" / package / "tests"
        for entry in listed:
            is_function = entry.column == "function"
            if not (has_function(entry.name, package) if is_function else has_test(entry.name, tests)):
                found.append(f"{where}:{entry.line}: no {entry.column} {entry.name}")
    return found


def main() -> int:
    """Print what is missing; the exit code says whether anything is."""
    found = problems()
    print("\n".join(found) or "every function and test of the paper maps exists")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
