"""Pictures: one way to get matplotlib, one style, one way to save."""

import os
from pathlib import Path
from typing import Any

from core_tensor.app.extras import require
from core_tensor.app.files import atomic_path

SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
"""Formats that `save` writes, by the suffix of the file."""

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.size": 9.0,
    "legend.frameon": False,
    "svg.hashsalt": "core-tensor",  # the same picture is the same file
}
"""What differs from matplotlib's defaults in every picture."""

_DOTS_PER_INCH = 150


def pyplot(extra: str) -> Any:
    """Matplotlib's pyplot in the house's style, with a backend that needs no screen.

    Args:
        extra: Requirement that brings matplotlib, such as `"quantease[plot]"`.

    Returns:
        The module `matplotlib.pyplot`.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra)
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    return require("matplotlib.pyplot", extra)


def check(path: str | os.PathLike[str], extra: str) -> None:
    """Refuse a picture that could not be written, before the work that it is to show.

    Args:
        path: Where it is to be written.
        extra: Requirement that brings matplotlib, such as `"quantease[plot]"`.

    Raises:
        ValueError: If the suffix names no format that `save` writes.
        MissingExtraError: If matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: expected a picture's name, ending in {', '.join(SUFFIXES)}")
    require("matplotlib", extra)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure and close it; the suffix of the path chooses the format.

    Args:
        figure: A matplotlib figure.
        path: File to write, in one of `SUFFIXES`.

    Raises:
        ValueError: If the suffix names no format.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a picture's name, ending in {', '.join(SUFFIXES)}")
    # neither the time nor the version of matplotlib: the same figure is the same file
    fixed = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DOTS_PER_INCH, bbox_inches="tight", metadata=fixed.get(suffix))
    require("matplotlib.pyplot", "matplotlib").close(figure)
