"""Pictures: sample grids side by side, metric curves with seed bands, estimators against the sample size."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from core_tensor.extras import pyplot
from core_tensor.files import atomic_path
from torch import Tensor

_EXTRA = "frechet-gan[plot]"


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure atomically and close it.

    Args:
        figure: Matplotlib figure.
        path: File name; its suffix sets the format.
    """
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None} if str(path).endswith("png") else None)
    pyplot(_EXTRA).close(figure)


def curves(axis: Any, histories: Sequence[Mapping[str, Any]], label: str = "held-out Fréchet distance") -> None:
    """Distance against CPU time, one line per method with the band of its seeds.

    Args:
        axis: Matplotlib axis.
        histories: Runs with `method` and `points`.
        label: Label of the vertical axis.
    """
    for method in dict.fromkeys(h["method"] for h in histories):
        runs = [h["points"] for h in histories if h["method"] == method]
        shortest = min(len(r) for r in runs)
        cpu = np.mean([[p["cpu_seconds"] for p in r[:shortest]] for r in runs], axis=0)
        values = np.array([[p["fd"] for p in r[:shortest]] for r in runs])
        (line,) = axis.plot(cpu, values.mean(0), marker="o", markersize=3, label=f"{method} ({len(runs)} seeds)")
        axis.fill_between(cpu, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(yscale="log", xlabel="CPU seconds of training", ylabel=label)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def curve_figure(histories: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """One picture of metric curves.

    Args:
        histories: Runs.
        path: File name.
    """
    figure, axis = pyplot(_EXTRA).subplots(figsize=(6.5, 4.2))
    curves(axis, histories)
    save(figure, path)


def grids_and_curves(
    grids: Mapping[str, Tensor], histories: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Sample grids in a row, and the metric curves beside them.

    Args:
        grids: Pictures (c, h, w) by title.
        histories: Runs; no curve is drawn for none.
        path: File name.
        title: Title of the whole.
    """
    count = len(grids) + bool(histories)
    figure, axes = pyplot(_EXTRA).subplots(1, count, figsize=(4.0 * count, 4.4), squeeze=False)
    for axis, (name, picture) in zip(axes[0], grids.items(), strict=False):
        pixels = ((picture.permute(1, 2, 0).numpy() + 1) / 2).clip(0, 1)
        axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    if histories:
        curves(axes[0][-1], histories)
    if title:
        figure.suptitle(title, fontsize=11)
    save(figure, path)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    xlabel: str,
    ylabel: str,
    zero: bool = False,
) -> None:
    """Several lines over a logarithmic horizontal axis.

    Args:
        series: Horizontal and vertical values by name.
        path: File name.
        xlabel: Label.
        ylabel: Label.
        zero: Linear vertical axis with a line at zero instead of a logarithmic one.
    """
    figure, axis = pyplot(_EXTRA).subplots(figsize=(6.5, 4.2))
    for name, (x, y) in series.items():
        axis.plot(x, y, marker="o", markersize=4, label=name)
    axis.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    if zero:
        axis.axhline(0, color="black", linewidth=0.8)
    else:
        axis.set_yscale("log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    save(figure, path)
