"""Pictures; need the extra `sgd-stability[plot]`."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from core_tensor.extras import pyplot
from core_tensor.files import atomic_path
from torch import Tensor

from sgd_stability.maps import StabilityMap

EXTRA = "sgd-stability[plot]"
STYLES: dict[str, dict[str, Any]] = {
    "exact": {"color": "black", "linewidth": 2.2},
    "stable below": {"color": "#1b7837", "linestyle": "--"},
    "unstable above": {"color": "#b2182b", "linestyle": "--"},
    "paper's Theorem 1": {"color": "#762a83", "linestyle": ":", "linewidth": 2},
    "paper's Theorem 2": {"color": "#2166ac", "linestyle": "-.", "linewidth": 1.5},
}


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure atomically and close it.

    Args:
        figure: A matplotlib figure.
        path: Picture to write.

    Returns:
        The path.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, bbox_inches="tight")
    pyplot(EXTRA).close(figure)
    return Path(path)


def plot_map(found: StabilityMap, path: str | Path, title: str = "", marks: Sequence[Mapping[str, Any]] = ()) -> Path:
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
    axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    axes.set_title(title)
    return save(figure, path)


def draw_map(axes: Any, found: StabilityMap, figure: Any) -> None:
    """Draw a map into existing axes.

    Args:
        axes: Matplotlib axes.
        found: The map.
        figure: Their figure, for the colour bar.
    """
    growth = found.log_growth.clamp(-0.5, 0.5).numpy()
    batches, rates = found.batch_sizes.numpy(), found.lrs.numpy()
    mesh = axes.pcolormesh(batches, rates, growth, cmap="RdYlGn_r", vmin=-0.5, vmax=0.5, shading="nearest")
    figure.colorbar(mesh, ax=axes, label="log growth of $E\\|\\delta\\|^2$ per step (clipped)")
    for name, values in found.curves.items():
        finite = [v if math.isfinite(v) else math.nan for v in values]
        if not all(math.isnan(v) for v in finite):
            axes.plot(batches, finite, label=name, **STYLES.get(name, {}))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(batches[0] / 2**0.5, batches[-1] * 2**0.5)
    axes.set_ylim(rates[0], rates[-1])
    axes.set_xlabel("batch size $B$")
    axes.set_ylabel("learning rate $\\eta$")


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
    return save(figure, path)


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
    return save(figure, path)


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
    return save(figure, path)
