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
    top = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != top:
            raise  # the module is there, something it needs is not
        raise MissingExtraError(f"this needs {top}, which is not installed: pip install '{extra}'") from error
