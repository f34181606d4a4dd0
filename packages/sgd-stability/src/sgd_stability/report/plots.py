"""Pictures; need the extra `sgd-stability[plot]`."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from core_tensor.app.extras import require
from core_tensor.app.figures import pyplot, save
from torch import Tensor

if TYPE_CHECKING:
    from sgd_stability.report.check import Check
    from sgd_stability.report.maps import StabilityMap
    from sgd_stability.theory.quadratic import Growth

EXTRA = "sgd-stability[plot]"
STYLES: dict[str, dict[str, Any]] = {
    "exact": {"color": "black", "linewidth": 2.4},
    "stable below": {"color": "white", "linestyle": "--", "linewidth": 1.8},
    "unstable above": {"color": "#ffd92f", "linestyle": "--", "linewidth": 1.8},
    "paper's Theorem 1": {"color": "#d9a6ff", "linestyle": ":", "linewidth": 2.2},
    "paper's Theorem 2": {"color": "#80d4ff", "linestyle": "-.", "linewidth": 1.8},
}


def line_style(name: str) -> dict[str, Any]:
    """How a boundary is drawn: in a light color with a dark rim, which shows on green, on red and on white.

    Args:
        name: Name of the boundary.

    Returns:
        Keyword arguments of a matplotlib line.
    """
    style = STYLES.get(name, {})
    effects = require("matplotlib.patheffects", EXTRA)
    rim = (
        []
        if name == "exact"
        else [effects.withStroke(linewidth=style.get("linewidth", 1.5) + 1.6, foreground="#333333")]
    )
    return {**style, "path_effects": rim}


def plot_map(found: "StabilityMap", path: str | Path, title: str = "", marks: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Heat map of the growth over batch size and learning rate, with the boundaries.

    Args:
        found: The map.
        path: Picture to write.
        title: Title.
        marks: Runs to mark: mappings with `batch_size`, `lr` and `outcome` (`"returns"` or `"leaves"`).

    Returns:
        The path.
    """
    plt = pyplot(EXTRA)
    figure, axes = plt.subplots(figsize=(7.6, 5.2))
    draw_map(axes, found, figure)
    for outcome, marker, colour in (("returns", "o", "#1b7837"), ("leaves", "X", "#b2182b")):
        chosen = [m for m in marks if m["outcome"] == outcome]
        if chosen:
            axes.scatter(
                [m["batch_size"] for m in chosen],
                [m["lr"] for m in chosen],
                marker=marker,
                s=70,
                color=colour,
                edgecolor="white",
                zorder=5,
                label=f"SGD {outcome}",
            )
    axes.legend(loc="lower right", fontsize=8, frameon=True, framealpha=0.9, facecolor="#cccccc")
    axes.set_title(title)
    save(figure, path)
    return Path(path)


def draw_map(axes: Any, found: "StabilityMap", figure: Any) -> None:
    """Draw a map into existing axes.

    Args:
        axes: Matplotlib axes.
        found: The map.
        figure: Their figure, for the colour bar.
    """
    growth = found.log_growth.clamp(-0.5, 0.5).numpy()
    batches, rates = found.batch_sizes.numpy(), found.lrs.numpy()
    columns = [batches[0] / 2**0.5, batches[-1] * 2**0.5]
    if len(batches) > 1:
        columns = [columns[0], *((batches[1:] + batches[:-1]) / 2), (3 * batches[-1] - batches[-2]) / 2]
    # Below the threshold the flattest directions decay slowly: on a linear scale all of it would look like zero.
    norm = require("matplotlib.colors", EXTRA).SymLogNorm(linthresh=1e-4, vmin=-0.5, vmax=0.5)
    # Without the yellow between green and red, where a slow decay would look like a slow growth.
    ramp = require("matplotlib", EXTRA).colormaps["RdYlGn_r"]
    shades = np.concatenate([np.linspace(0.0, 0.38, 128), np.linspace(0.62, 1.0, 128)])
    colors = require("matplotlib.colors", EXTRA).ListedColormap(ramp(shades))
    for j, exact in enumerate(found.curves.get("exact", [math.nan] * len(batches))):
        rows = _row_edges(rates, exact)
        mesh = axes.pcolormesh(columns[j : j + 2], rows, growth[:, j : j + 1], cmap=colors, norm=norm)
    figure.colorbar(mesh, ax=axes, label="log growth of $E\\|\\delta\\|^2$ per step (clipped)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(columns[0], columns[-1])
    for name, values in found.curves.items():
        finite = [v if v is not None and math.isfinite(v) else math.nan for v in values]
        if not all(math.isnan(v) for v in finite):
            # a step per column of cells: a line between the columns' middles would contradict the cells beside it
            steps = [edge for edge in columns for _ in range(2)][1:-1]
            axes.plot(steps, [v for v in finite for _ in range(2)], label=name, **line_style(name))
    axes.set_ylim(rates[0], rates[-1])
    axes.set_xlabel("batch size $B$")
    axes.set_ylabel("learning rate $\\eta$")


def _row_edges(rates: Any, exact: float) -> list[float]:
    """Where the cells of a column end: halfway between rates, and at the threshold between the two beside it."""
    middles = [math.sqrt(low * high) for low, high in pairwise(rates)]
    below = sum(rate < exact for rate in rates)
    if 0 < below < len(rates):
        middles[below - 1] = exact
    ratio = rates[-1] / rates[-2] if len(rates) > 1 else 2.0
    return [rates[0] / math.sqrt(ratio), *middles, rates[-1] * math.sqrt(ratio)]


def plot_coherence(matrix: Tensor, labels: Tensor, path: str | Path) -> Path:
    """Coherence matrix with the samples sorted by class, each entry divided by sqrt(S_ii S_jj).

    Args:
        matrix: S, shape (n, n).
        labels: Class of every sample, shape (n,).
        path: Picture to write.

    Returns:
        The path.
    """
    plt = pyplot(EXTRA)
    order = labels.argsort(stable=True)
    root = matrix.diagonal().clamp_min(1e-300).sqrt()
    alignment = (matrix / torch.outer(root, root))[order][:, order]
    figure, axes = plt.subplots(figsize=(6.2, 5.4))
    image = axes.imshow(alignment.numpy(), cmap="magma", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="$S_{ij} / \\sqrt{S_{ii} S_{jj}}$")
    edges = torch.nonzero(torch.diff(labels[order])).reshape(-1).add(0.5).tolist()
    for edge in edges:
        axes.axhline(edge, color="white", linewidth=0.4)
        axes.axvline(edge, color="white", linewidth=0.4)
    classes = labels.unique(sorted=True)
    starts = [-0.5, *edges, len(labels) - 0.5]
    middles = [(a + b) / 2 for a, b in pairwise(starts)]
    axes.set_xticks(middles, classes.tolist())
    axes.set_yticks(middles, classes.tolist())
    axes.set_title("coherence of per-sample Hessians, by class")
    save(figure, path)
    return Path(path)


def plot_sample_curvature(curvature: Tensor, lambda1: float, path: str | Path) -> Path:
    """Histogram of lambda1(H_i): the right tail caps the learning rate of small batches.

    Args:
        curvature: lambda1(H_i), shape (n,).
        lambda1: Sharpness of the mean.
        path: Picture to write.

    Returns:
        The path.
    """
    plt = pyplot(EXTRA)
    figure, axes = plt.subplots(figsize=(6.4, 4))
    axes.hist(curvature.numpy(), bins=40, color="#4393c3")
    axes.axvline(lambda1, color="black", linestyle="--", label=f"$\\lambda_1(H)$ = {lambda1:.3g}")
    axes.axvline(float(curvature.max()), color="#b2182b", linestyle="--", label=f"L = {float(curvature.max()):.3g}")
    axes.set_xlabel("$\\lambda_1(H_i)$")
    axes.set_ylabel("samples")
    axes.legend()
    save(figure, path)
    return Path(path)


def plot_spectral_density(grid: Tensor, density: Tensor, path: str | Path) -> Path:
    """Spectral density by stochastic Lanczos quadrature.

    Args:
        grid: Eigenvalues, shape (m,).
        density: Density, shape (m,).
        path: Picture to write.

    Returns:
        The path.
    """
    plt = pyplot(EXTRA)
    figure, axes = plt.subplots(figsize=(6.4, 4))
    axes.semilogy(grid.numpy(), density.clamp_min(1e-12).numpy(), color="#4393c3")
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    axes.set_ylim(1e-6, None)
    save(figure, path)
    return Path(path)


def plot_growth(curves: Mapping[str, "Growth"], path: str | Path, title: str = "") -> Path:
    """Growth of E||delta||^2: exact (lines) and simulated (bands of two standard errors).

    Args:
        curves: Growth by label, such as a multiple of the threshold.
        path: Picture to write.
        title: Title.

    Returns:
        The path.
    """
    figure, axes = pyplot(EXTRA).subplots(figsize=(6.8, 4.4))
    for i, (label, growth) in enumerate(curves.items()):
        steps = range(len(growth.exact))
        low = (growth.simulated - 2 * growth.standard_error).clamp_min(1e-300)
        axes.plot(steps, growth.exact.numpy(), color=f"C{i}", label=f"{label}, exact")
        axes.fill_between(
            steps, low.numpy(), (growth.simulated + 2 * growth.standard_error).numpy(), color=f"C{i}", alpha=0.3
        )
        axes.plot(steps, growth.simulated.numpy(), ".", color=f"C{i}", markersize=4, label="simulated")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("$E\\|\\delta\\|^2$, relative to the start")
    axes.legend(fontsize=8, ncols=2)
    axes.set_title(title)
    save(figure, path)
    return Path(path)


def plot_history(
    checks: Sequence["Check"],
    path: str | Path,
    *,
    losses: Sequence[tuple[int, float]] = (),
    sharpness: Sequence[tuple[int, float, float]] = (),
) -> Path:
    """Over training: the loss, the sharpness against its edge, and the learning rate against the band of eta*.

    Args:
        checks: A monitor's history, at least one check.
        path: Picture to write.
        losses: Losses (step, loss).
        sharpness: Tier-1 measurements (step, batch sharpness, critical sharpness).

    Returns:
        The path.

    Raises:
        ValueError: If there is no check.
    """
    if not checks:
        raise ValueError("checks: expected at least one, got none")
    rows = 3 if losses else 2
    figure, panels = pyplot(EXTRA).subplots(rows, 1, figsize=(8, 2.6 * rows), sharex=True, layout="constrained")
    if losses:
        panels[0].semilogy(*zip(*losses, strict=True), color="#444444", linewidth=1)
        panels[0].set_ylabel("loss")
    curvature, rates = panels[-2:]
    steps = [check.step for check in checks]
    for name, column, colour in (("batch sharpness", 1, "#92c5de"), ("critical sharpness", 2, "#f4a582")):
        shown = [(entry[0], entry[column]) for entry in sharpness if 0 < entry[column] < math.inf]
        if shown:
            curvature.plot(*zip(*shown, strict=True), ".", color=colour, markersize=3, label=name)
    curvature.plot(steps, [check.lambda1 for check in checks], color="black", label="$\\lambda_1$")
    curvature.plot(steps, [check.edge for check in checks], "--", color="#b2182b", label="edge of full-batch training")
    curvature.set_yscale("log")
    curvature.set_ylabel("sharpness")
    lower, upper = ([getattr(check, name) for check in checks] for name in ("lower", "upper"))
    rates.fill_between(steps, lower, upper, color="#bdbdbd", label="band of $\\eta^*$")
    rates.plot(steps, [check.lr for check in checks], color="#2166ac", label="learning rate")
    settled = [(check.step, check.exact) for check in checks if math.isfinite(check.exact)]
    if settled:
        rates.plot(*zip(*settled, strict=True), color="black", linewidth=1, label="$\\eta^*$ by full analysis")
    rates.set_yscale("log")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    alarms = [check.step for check in checks if check.state in {"unstable", "diverged"}]
    for step in alarms:
        for panel in panels:
            panel.axvline(step, color="#b2182b", alpha=0.3, linewidth=1.5, zorder=0)
    for panel in (curvature, rates):
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))  # beside the panel: it covers no line
    if alarms:
        panels[0].set_title("red: checks that say unstable or diverged", fontsize=9)
    save(figure, path)
    return Path(path)
