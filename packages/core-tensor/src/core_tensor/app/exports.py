"""Names of a package that are imported when they are first used (PEP 562), so that its command line starts at once."""

import ast
import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Build `__getattr__` and `__dir__` of a package whose public names live in its submodules.

    The package imports its names under `if TYPE_CHECKING:`, where type checkers and readers see them; this reads the
    same block, and imports each name when it is first asked for.

        if TYPE_CHECKING:
            from sgd_stability.theory.bounds import Bound

        __all__ = ["Bound"]
        __getattr__, __dir__, _ = lazy(__name__)

    Args:
        package: `__name__` of the package.

    Returns:
        The two, to be assigned in the package's `__init__`, and the names. `__getattr__` raises AttributeError for
        other names.
    """
    home = _imports_for_type_checkers(package)

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = home[name]
        found = importlib.import_module(module)
        value = getattr(found, attribute) if attribute else found
        setattr(sys.modules[package], name, value)  # the next access finds it without coming here
        return value

    def names_of_package() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return get, names_of_package, sorted(home)


def _imports_for_type_checkers(package: str) -> dict[str, tuple[str, str]]:
    """Module and attribute of every name that a package imports under `if TYPE_CHECKING:`; no attribute is a module."""
    spec = sys.modules[package].__spec__
    source = spec.loader.get_source(package)  # type: ignore[union-attr]
    home = {}
    for block in ast.parse(source).body:
        if not (isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"):
            continue
        for statement in block.body:
            if isinstance(statement, ast.ImportFrom) and statement.module:
                for alias in statement.names:
                    name = alias.asname or alias.name
                    is_module = statement.module == package  # `from package import module`
                    home[name] = (f"{package}.{alias.name}", "") if is_module else (statement.module, alias.name)
    return home
