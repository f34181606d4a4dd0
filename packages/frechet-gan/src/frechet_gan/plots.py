"""Pictures: sample grids side by side, metric curves with seed bands, estimators against the sample size."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from core_tensor.app.figures import pyplot, save
from torch import Tensor

EXTRA = "frechet-gan[plot]"
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # horizontal and vertical values by name


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
    axis.set(xlabel="CPU seconds of training", ylabel=label)
    _logarithmic(axis)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def _logarithmic(axis: Any) -> None:
    """A vertical axis with a logarithmic scale and plain numbers, also between powers of ten."""
    axis.set_yscale("log", subs=(2, 5))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")


def curve_figure(histories: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """One picture of metric curves.

    Args:
        histories: Runs.
        path: File name.
    """
    figure, axis = pyplot(EXTRA).subplots(figsize=(6.5, 4.2))
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
    figure, axes = pyplot(EXTRA).subplots(1, count, figsize=(4.0 * count, 4.4), squeeze=False)
    for axis, (name, picture) in zip(axes[0], grids.items(), strict=False):
        show(axis, picture, name)
    if histories:
        curves(axes[0][-1], histories)
    if title:
        figure.suptitle(title, fontsize=11)
    save(figure, path)


def grids_and_pairs(
    grids: Mapping[str, Tensor], series: Series, path: str | os.PathLike[str], xlabel: str = "generator steps"
) -> None:
    """Sample grids, and beside them distances of two generators in two encoders each.

    Args:
        grids: Pictures (c, h, w) by title.
        series: Steps and distances by name; the first two belong to one generator.
        path: File name.
        xlabel: Label of the horizontal axis.
    """
    figure, axes = pyplot(EXTRA).subplots(1, len(grids) + 1, figsize=(4.0 * (len(grids) + 1), 4.4))
    for axis, (name, picture) in zip(axes, grids.items(), strict=False):
        show(axis, picture, name)
    styles = [("C3", "--"), ("C3", "-"), ("C0", "--"), ("C0", "-")]
    for (name, (x, y)), (color, style) in zip(series.items(), styles, strict=False):
        axes[-1].plot(x, y, color=color, linestyle=style, marker="o", markersize=3, label=name)
    axes[-1].set(xlabel=xlabel, ylabel="Fréchet distance")
    _logarithmic(axes[-1])
    axes[-1].grid(alpha=0.3, which="both")
    axes[-1].legend(fontsize=8)
    save(figure, path)


def tiles(pictures: Mapping[str, Tensor], path: str | os.PathLike[str], columns: int = 4) -> None:
    """Sample grids in rows, each under its title.

    Args:
        pictures: Pictures (c, h, w) by title.
        path: File name.
        columns: Pictures per row.
    """
    rows = -(-len(pictures) // columns)
    figure, axes = pyplot(EXTRA).subplots(rows, columns, figsize=(3.0 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, picture) in zip(axes.flat, pictures.items(), strict=False):
        show(axis, picture, title)
    save(figure, path)


def show(axis: Any, picture: Tensor, title: str = "") -> None:
    """Draw one picture.

    Args:
        axis: Matplotlib axis.
        picture: Pixels in [-1, 1], shape (c, h, w).
        title: Title.
    """
    pixels = ((picture.permute(1, 2, 0).numpy() + 1) / 2).clip(0, 1)
    axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.axis("off")


def lines(
    series: Series,
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
    figure, axis = pyplot(EXTRA).subplots(figsize=(6.5, 4.2))
    for name, (x, y) in series.items():
        axis.plot(x, y, marker="o", markersize=4, label=name)
    axis.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    if zero:
        axis.axhline(0, color="black", linewidth=0.8)
    else:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    ticks = sorted({float(v) for x, _ in series.values() for v in x})
    axis.set_xticks(ticks, [f"{v:g}" for v in ticks])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    save(figure, path)
