"""Optional dependencies: import them where they are used, and name the extra when they are missing."""

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """A feature needs a package that is not installed; the message is the command that installs it."""


def require(module: str, extra: str) -> Any:
    """Import an optional module.

    Args:
        module: Module to import, such as `"matplotlib.pyplot"`.
        extra: Requirement that brings it, such as `"quantease[plot]"`.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: If the module's distribution is not installed.
        ModuleNotFoundError: If it is installed, but something it needs is not.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name.split(".")[0]):
            raise  # the module is there, something it needs is not
        raise MissingExtraError(f"{module} is not installed: pip install '{extra}'") from error


def pyplot(extra: str) -> Any:
    """Matplotlib's pyplot with a backend that needs no screen.

    Args:
        extra: Requirement that brings matplotlib, such as `"quantease[plot]"`.

    Returns:
        The module `matplotlib.pyplot`.
    """
    require("matplotlib", extra).use("Agg")
    return importlib.import_module("matplotlib.pyplot")
