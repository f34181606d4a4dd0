"""Names of a package that are imported when they are first used (PEP 562), so that its command line starts at once."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Build `__getattr__`, `__dir__` and `__all__` of a package whose public names live in its submodules.

    A type checker does not see through this: the package repeats the imports under `if TYPE_CHECKING:`.

        __getattr__, __dir__, __all__ = lazy(__name__, {"theory.bounds": ["sharp_bounds"]})

    Args:
        package: `__name__` of the package.
        names: Submodule, without the package's name, to the names that it provides.

    Returns:
        The three, to be assigned in the package's `__init__`. `__getattr__` raises AttributeError for other names.
    """
    home = {name: f"{package}.{module}" for module, provided in names.items() for name in provided}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home[name]), name)
        setattr(sys.modules[package], name, value)  # the next access finds it without coming here
        return value

    def names_of_package() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return get, names_of_package, sorted(home)
