"""The pictures of the demo and the evidence."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from core_tensor.app.figures import pyplot, save

COLOURS = {
    "sgd": "#7f7f7f",
    "sam": "#1f77b4",
    "asam": "#9467bd",
    "msam": "#d62728",
    "msam-sequential": "#ff9896",
    "half": "#2ca02c",
    "chained": "#bcbd22",
}


def bars(axis: Any, rows: Sequence[Mapping[str, Any]], key: str, title: str, form: str = ".3g") -> None:
    """One bar per method, with the standard error over seeds.

    Args:
        axis: A matplotlib axis.
        rows: Summaries, each with `method`, `key` and `key + "_se"`.
        key: What is shown.
        title: Title of the axis.
        form: Format of the figures above the bars.
    """
    names = [row["method"] for row in rows]
    values = [row[key] for row in rows]
    errors = [row.get(f"{key}_se") or 0.0 for row in rows]
    axis.bar(range(len(rows)), values, yerr=errors, capsize=3, color=[COLOURS.get(n, "#1f77b4") for n in names])
    for i, value in enumerate(values):
        axis.annotate(
            f"{value:{form}}",
            (i, value + errors[i]),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # above the lines that a caller draws
        )
    axis.set_xticks(range(len(rows)), [n.replace("msam-", "msam\n") for n in names], fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.margins(y=0.18)


def gap_curves(axis: Any, gaps: Mapping[str, Sequence[float]]) -> None:
    """Sharpness gap by epoch, one line per method.

    Args:
        axis: A matplotlib axis.
        gaps: L(w + eps) - L(w) by epoch, for each method.
    """
    for name, curve in gaps.items():
        axis.plot(range(1, len(curve) + 1), curve, color=COLOURS.get(name), label=name)
    _logarithmic(axis)
    axis.set_title(r"sharpness gap $L(w+\epsilon)-L(w)$", fontsize=10)
    axis.set_xlabel("epoch", fontsize=8)
    axis.legend(fontsize=8)


def comparison(
    rows: Sequence[Mapping[str, Any]], gaps: Mapping[str, Sequence[float]], path: str | os.PathLike[str], title: str,
    *, timed: bool = True,
) -> None:  # fmt: skip
    """Accuracy, flatness, cost and, where it was recorded, the sharpness gap during training, method by method.

    Args:
        rows: Summaries by method.
        gaps: L(w + eps) - L(w) by epoch, for each perturbing method; may be empty.
        path: Picture to write.
        title: Heading.
        timed: Whether the times are worth a look: not where the machine had other work.
    """
    panels = 3 + timed + bool(gaps)
    figure, axes = pyplot("msam[plot]").subplots(1, panels, figsize=(3.6 * panels, 3.8))
    bars(axes[0], rows, "test", "test accuracy (%)", ".2f")
    values = [row["test"] for row in rows]
    spread = max(max(values) - min(values), 0.5)
    axes[0].set_ylim(min(values) - 1.5 * spread, max(values) + spread)
    bars(axes[1], rows, "lambda_max", r"largest Hessian eigenvalue $\lambda_{max}$")
    bars(axes[2], rows, "trace", "trace of the Hessian")
    if timed and all(row["step_ratio"] is not None for row in rows):
        bars(axes[3], rows, "step_ratio", "CPU time per step / SGD")
        axes[3].axhline(2.0, color="black", lw=0.8, ls="--")
        axes[3].axhline(5 / 3, color="black", lw=0.8, ls=":")
        axes[3].set_xlabel("dashed: 2 (SAM), dotted: 5/3 (ghost's floor)", fontsize=8)
    elif timed:  # without SGD there is nothing to divide by
        bars(axes[3], rows, "step_ms", "CPU milliseconds per step")
    if gaps:
        gap_curves(axes[-1], gaps)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def _logarithmic(axis: Any) -> None:
    axis.set_yscale("log", subs=(2, 3, 5))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")


def sensitivity(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str) -> None:
    """Test accuracy, top eigenvalue and trace over rho, one line per number of micro-batches.

    Args:
        rows: With m, rho, and test, lambda_max, trace with their `_se`.
        path: Picture to write.
        title: Heading.
    """
    figure, axes = pyplot("msam[plot]").subplots(1, 3, figsize=(13, 3.8))
    radii = sorted({row["rho"] for row in rows})
    for m in sorted({row["m"] for row in rows}):
        own = sorted((row for row in rows if row["m"] == m), key=lambda row: row["rho"])
        for axis, key in zip(axes, ("test", "lambda_max", "trace"), strict=True):
            errors = [row.get(f"{key}_se") or 0.0 for row in own]
            places, values = [row["rho"] for row in own], [row[key] for row in own]
            axis.errorbar(places, values, yerr=errors, marker="o", ms=4, capsize=3, label=f"m = {m}")
    for axis, name in zip(axes, ("test accuracy (%)", r"$\lambda_{max}$", "trace of the Hessian"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(radii, [f"{radius:g}" for radius in radii])
        axis.set_xlabel(r"$\rho$")
        axis.set_title(name, fontsize=10)
    for axis in axes[1:]:
        _logarithmic(axis)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{title}: sensitivity to m and rho (m = 1 is SAM)", fontsize=11)
    save(figure, path)


def cost(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str) -> None:
    """Time of a step over a plain one against the number of micro-batches, one panel per model.

    Args:
        rows: With model, mode, m and ratio.
        path: Picture to write.
        title: Heading.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    colours = {
        "ghost": COLOURS["msam"],
        "sequential": COLOURS["sam"],
        "vmap": COLOURS["half"],
        "chained": COLOURS["chained"],
    }
    figure, axes = pyplot("msam[plot]").subplots(1, len(models), figsize=(4.4 * len(models) + 0.6, 3.8), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        own = [row for row in rows if row["model"] == model]
        for mode in dict.fromkeys(row["mode"] for row in own):
            points = sorted((row["m"], row["ratio"]) for row in own if row["mode"] == mode)
            axis.plot(*zip(*points, strict=True), marker="o", ms=4, color=colours.get(mode), label=mode)
        counts = sorted({row["m"] for row in own})
        for level, style, name in ((2.0, "--", "2 (SAM)"), (5 / 3, ":", "5/3")):
            axis.axhline(level, color="black", lw=0.8, ls=style)
            axis.text(1.01, level, name, transform=axis.get_yaxis_transform(), va="center", fontsize=7)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(counts, [str(m) for m in counts])
        ticks = [t for t in (1, 2, 4, 8, 16, 32, 64) if t <= 1.3 * max(row["ratio"] for row in own)]
        axis.set_yticks(ticks, [str(t) for t in ticks])
        axis.set_xlabel("micro-batches m")
        axis.set_title(model, fontsize=10)
    axes[0][0].set_ylabel("CPU time per step / SGD")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def portrait(
    cosines: Mapping[str, Sequence[float]],
    gaps: Mapping[str, Sequence[float]],
    slices: Mapping[str, tuple[Any, Any]],
    path: str | os.PathLike[str],
    title: str,
) -> None:
    """Cosines of micro-batch and mean gradients, the sharpness gap, and the loss around each method's minimum.

    Args:
        cosines: cos(g_j, g) over the run, by method.
        gaps: L(w + eps) - L(w) by epoch, by method.
        slices: Axis and losses as `msam.study.flatness.loss_slice` returns them, by method.
        path: Picture to write.
        title: Heading.
    """
    figure, axes = pyplot("msam[plot]").subplots(1, 2 + len(slices), figsize=(3.9 * (2 + len(slices)), 3.8))
    for name, values in cosines.items():
        axes[0].hist(values, bins=30, range=(-0.2, 1.0), density=True, alpha=0.6, color=COLOURS.get(name), label=name)
    axes[0].set_title(r"$\cos(g_j, g)$ of micro-batch and mean gradients", fontsize=10)
    axes[0].legend(fontsize=8)
    gap_curves(axes[1], gaps)
    low = max(min(float(losses.min()) for _, losses in slices.values()), 1e-4)
    high = max(max(float(losses.max()) for _, losses in slices.values()), 1.01 * low)
    levels = [low * (high / low) ** (k / 16) for k in range(17)]  # the same for all methods
    for axis, (name, (places, losses)) in zip(axes[2:], slices.items(), strict=True):
        places, grid = [float(v) for v in places], losses.clamp(levels[0], levels[-1]).tolist()
        filled = axis.contourf(places, places, grid, levels=levels, norm="log", cmap="viridis_r")
        axis.plot([0.0], [0.0], "k+")
        axis.set_title(f"loss around the minimum of {name}", fontsize=10)
        axis.set_aspect("equal")
    figure.colorbar(filled, ax=axes[-1], label="training loss", ticks=levels[::4], format="%.2g")
    figure.suptitle(title, fontsize=11)
    save(figure, path)
