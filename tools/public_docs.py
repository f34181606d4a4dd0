"""Every public name is documented in full: `public_docs.py` prints what is missing.

Public are the names in a package's `__all__`, with the public methods and properties that a class defines itself. A
function names its arguments under `Args`, says what it returns (or yields) and has a summary; a class has a summary and
names the arguments of its constructor under `Args` or `Attributes`. Every operator of core-tensor has its row on the
page of that package.
"""

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from workspace import ROOT, packages

OPERATORS = ROOT / "docs" / "packages" / "core-tensor.md"
_UNNAMED = {"self", "cls"}


def section(docstring: str, *titles: str) -> str | None:
    """The text of a section in Google's style, or None."""
    found = re.search(rf"^(?:{'|'.join(titles)}):\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    return found[1] if found else None


def undocumented_arguments(docstring: str, names: list[str], *titles: str) -> list[str]:
    """Arguments that the section does not name."""
    text = section(docstring, *titles) or ""
    named = {
        name.strip(" *`")
        for line in re.findall(r"^[ \t]+([*`\w, ]+?)(?: \(.*?\))?:", text, re.MULTILINE)
        for name in line.split(",")
    }
    return [name for name in names if name not in named]


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that callers pass."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return []
    return [name for name in signature.parameters if name not in _UNNAMED and not name.startswith("_")]


def faults(name: str, value: Any) -> Iterator[str]:
    """What is missing of one public name."""
    if inspect.isclass(value):
        yield from class_faults(name, value)
    elif callable(value):
        yield from function_faults(name, value)


def function_faults(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """What is missing of a function or method."""
    docstring = inspect.getdoc(function) or ""
    if not docstring:
        yield f"{name}: no docstring"
        return
    for argument in undocumented_arguments(docstring, parameters(function), "Args"):
        yield f"{name}: argument {argument} is not under Args"
    returns = getattr(function, "__annotations__", {}).get("return")
    if returns not in {None, "None", "NoReturn"} and section(docstring, "Returns", "Yields") is None:
        yield f"{name}: no Returns"


def class_faults(name: str, cls: type) -> Iterator[str]:
    """What is missing of a class and of what it defines."""
    docstring = inspect.getdoc(cls) or ""
    if not docstring or (dataclasses.is_dataclass(cls) and docstring.startswith(f"{cls.__name__}(")):
        yield f"{name}: no docstring"
        return
    own = "__init__" in vars(cls)
    constructor = vars(cls).get("__init__", cls)
    arguments = parameters(constructor) if own else []
    arguments = [argument for argument in arguments if argument not in {"args", "kwargs"}]
    init = inspect.getdoc(constructor) if own else ""
    for argument in undocumented_arguments(f"{docstring}\n\n{init or ''}", arguments, "Args", "Attributes"):
        yield f"{name}: argument {argument} is under neither Args nor Attributes"
    for member, value in vars(cls).items():
        if member.startswith("_"):
            continue
        if isinstance(value, property):
            if not inspect.getdoc(value):
                yield f"{name}.{member}: no docstring"
        elif isinstance(value, classmethod | staticmethod):
            yield from function_faults(f"{name}.{member}", value.__func__)
        elif inspect.isfunction(value) and value.__module__ == cls.__module__:
            yield from function_faults(f"{name}.{member}", value)


def main() -> int:
    """Print the faults of all packages; 1 if there are any."""
    missing: list[str] = []
    for package in packages():
        module = importlib.import_module(package.replace("-", "_"))
        if not getattr(module, "__all__", None):
            missing.append(f"{module.__name__}: no __all__")
        for name in getattr(module, "__all__", ()):
            missing += faults(f"{module.__name__}.{name}", getattr(module, name))
    page = OPERATORS.read_text(encoding="utf-8")
    core = importlib.import_module("core_tensor")
    missing += [f"{OPERATORS.name}: no word of core_tensor.{name}" for name in core.__all__ if f"`{name}" not in page]
    for line in missing:
        print(line)
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
