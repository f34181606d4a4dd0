"""The pictures of the demo and the evidence."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from core_tensor.extras import pyplot
from core_tensor.files import atomic_path

COLOURS = {
    "sgd": "#7f7f7f",
    "sam": "#1f77b4",
    "asam": "#9467bd",
    "msam": "#d62728",
    "msam-sequential": "#ff9896",
    "half": "#2ca02c",
    "chained": "#bcbd22",
}


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure atomically and close it.

    Args:
        figure: A matplotlib figure.
        path: PNG or SVG file.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot("msam[plot]").close(figure)


def bars(axis: Any, rows: Sequence[Mapping[str, Any]], key: str, title: str) -> None:
    """One bar per method, with the standard error over seeds.

    Args:
        axis: A matplotlib axis.
        rows: Summaries, each with `method`, `key` and `key + "_se"`.
        key: What is shown.
        title: Title of the axis.
    """
    names = [row["method"] for row in rows]
    values = [row[key] for row in rows]
    errors = [row.get(f"{key}_se") or 0.0 for row in rows]
    axis.bar(range(len(rows)), values, yerr=errors, capsize=3, color=[COLOURS.get(n, "#1f77b4") for n in names])
    for i, value in enumerate(values):
        axis.annotate(
            f"{value:.3g}",
            (i, value + errors[i]),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axis.set_xticks(range(len(rows)), [n.replace("msam-", "msam\n") for n in names], fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.margins(y=0.18)
    axis.spines[["top", "right"]].set_visible(False)


def gap_curves(axis: Any, gaps: Mapping[str, Sequence[float]]) -> None:
    """Sharpness gap by epoch, one line per method.

    Args:
        axis: A matplotlib axis.
        gaps: L(w + eps) - L(w) by epoch, for each method.
    """
    for name, curve in gaps.items():
        axis.plot(range(1, len(curve) + 1), curve, color=COLOURS.get(name), label=name)
    axis.set_yscale("log")
    axis.set_title(r"sharpness gap $L(w+\epsilon)-L(w)$", fontsize=10)
    axis.set_xlabel("epoch", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)


def comparison(
    rows: Sequence[Mapping[str, Any]], gaps: Mapping[str, Sequence[float]], path: str | os.PathLike[str], title: str
) -> None:
    """Accuracy, flatness, cost and, where it was recorded, the sharpness gap during training, method by method.

    Args:
        rows: Summaries by method.
        gaps: L(w + eps) - L(w) by epoch, for each perturbing method; may be empty.
        path: Picture to write.
        title: Heading.
    """
    figure, axes = pyplot("msam[plot]").subplots(
        1, 3 + bool(gaps), figsize=(15 if gaps else 11.5, 3.8), layout="constrained"
    )
    bars(axes[0], rows, "test", "test accuracy (%)")
    values = [row["test"] for row in rows]
    spread = max(max(values) - min(values), 0.5)
    axes[0].set_ylim(min(values) - 1.5 * spread, max(values) + spread)
    bars(axes[1], rows, "lambda_max", r"largest Hessian eigenvalue $\lambda_{max}$")
    bars(axes[2], rows, "step_ratio", "CPU time per step / SGD")
    axes[2].axhline(2.0, color="black", lw=0.8, ls="--")
    axes[2].axhline(5 / 3, color="black", lw=0.8, ls=":")
    axes[2].set_xlabel("dashed: 2 (SAM), dotted: 5/3 (ghost's floor)", fontsize=8)
    if gaps:
        gap_curves(axes[3], gaps)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def sensitivity(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str) -> None:
    """Test accuracy and top eigenvalue over rho, one line per number of micro-batches.

    Args:
        rows: With m, rho, test, test_se, lambda_max, lambda_max_se.
        path: Picture to write.
        title: Heading.
    """
    figure, axes = pyplot("msam[plot]").subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    radii = sorted({row["rho"] for row in rows})
    for m in sorted({row["m"] for row in rows}):
        own = sorted((row for row in rows if row["m"] == m), key=lambda row: row["rho"])
        for axis, key in zip(axes, ("test", "lambda_max"), strict=True):
            errors = [row[f"{key}_se"] or 0.0 for row in own]
            places, values = [row["rho"] for row in own], [row[key] for row in own]
            axis.errorbar(places, values, yerr=errors, marker="o", ms=4, capsize=3, label=f"m = {m}")
    for axis, name in zip(axes, ("test accuracy (%)", r"$\lambda_{max}$"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(radii, [f"{radius:g}" for radius in radii])
        axis.set_xlabel(r"$\rho$")
        axis.set_title(name, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{title}: sensitivity to m and rho (m = 1 is SAM)", fontsize=11)
    save(figure, path)
