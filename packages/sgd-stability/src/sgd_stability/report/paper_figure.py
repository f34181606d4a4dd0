"""The paper's figure: stable and unstable cells over batch size and coherence, both theorems, the exact threshold."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from core_tensor.app.figures import pyplot, save

from sgd_stability.report.maps import stability_map
from sgd_stability.report.plots import EXTRA, draw_map, line_style
from sgd_stability.theory.bounds import all_bounds, paper_instability, paper_stability
from sgd_stability.theory.dynamics import SGD
from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.quadratic import make_hessians
from sgd_stability.theory.sampling import Sampling, Scheme, powers_of_two
from sgd_stability.theory.second_moment import lr_threshold, second_moment_radius


def family_table(n: int, sigma: float, lambda1: float, scheme: Scheme, seed: int) -> list[dict[str, Any]]:
    """Thresholds and bounds of one synthetic family, by batch size.

    Args:
        n: Number of samples; the dimension is the same.
        sigma: Coherence.
        lambda1: Sharpness.
        scheme: Minibatch scheme.
        seed: Seed of the directions.

    Returns:
        One row per batch size.
    """
    family = CurvatureFamily.from_hessians(make_hessians(n, n, sigma, lambda1, seed=seed))
    rows = []
    for B in powers_of_two(n):
        sampling = Sampling(n, B, scheme)
        bounds = {b.name: b.lr for b in all_bounds(family, sampling)}
        rows.append(
            {
                "B": B,
                "stable_below": max(bounds["curvature"], bounds["lyapunov"]),
                "exact": lr_threshold(family, sampling).value,
                "unstable_above": min(bounds["sample"], bounds["rayleigh"], bounds["gradient_descent"]),
                "paper_theorem1": bounds["paper_theorem1"],
                "paper_theorem2": bounds["paper_theorem2"],
            }
        )
    return [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows]


def plot_quadratic(
    path: str | Path, *, n: int, sigma: float, lambda1: float, lr: float, scheme: Scheme, seed: int = 0
) -> Path:
    """Left: growth over batch size and learning rate at one coherence. Right: the paper's cells over B and sigma.

    Args:
        path: Picture to write.
        n: Number of samples.
        sigma: Coherence of the left panel.
        lambda1: Sharpness.
        lr: Learning rate of the right panel.
        scheme: Minibatch scheme.
        seed: Seed of the directions.

    Returns:
        The path.
    """
    plt = pyplot(EXTRA)
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.2))
    family = CurvatureFamily.from_hessians(make_hessians(n, n, sigma, lambda1, seed=seed))
    batches = powers_of_two(n)
    rows = family_table(n, sigma, lambda1, scheme, seed)
    names = {
        "exact": "exact",
        "stable below": "stable_below",
        "unstable above": "unstable_above",
        "paper's Theorem 1": "paper_theorem1",
        "paper's Theorem 2": "paper_theorem2",
    }
    curves = {label: [row[key] for row in rows] for label, key in names.items()}
    rates = np.geomspace(0.3 * min(row["exact"] for row in rows), 4 / lambda1, 30).tolist()
    draw_map(left, stability_map(family, n, rates, batches, scheme, SGD, curves), figure)
    left.legend(fontsize=8, loc="lower right", frameon=True, framealpha=0.9, facecolor="#cccccc")
    left.set_title(f"n = {n}, $\\sigma$ = {sigma:g}, $\\lambda_1$ = {lambda1:g}, {scheme}")
    _draw_cells(right, n, lambda1, lr, scheme, seed)
    save(figure, path)
    return Path(path)


def _draw_cells(axes: Any, n: int, lambda1: float, lr: float, scheme: Scheme, seed: int) -> None:
    batches = powers_of_two(n)
    sigmas = np.geomspace(1, n, 13).tolist()
    families = [CurvatureFamily.from_hessians(make_hessians(n, n, s, lambda1, seed=seed)) for s in sigmas]
    for s, family in zip(sigmas, families, strict=True):
        stable = [second_moment_radius(family, lr, Sampling(n, B, scheme)).value <= 1 + 1e-9 for B in batches]
        for B, good in zip(batches, stable, strict=True):
            axes.scatter(B, s, marker="s", s=130, color="#a6dba0" if good else "#f4a582", zorder=1)
    fine = np.geomspace(1, n, 400)
    for label, rule in (("paper's Theorem 1", paper_instability), ("paper's Theorem 2", paper_stability)):
        edges = [next((s for s in fine if rule(lambda1, s, Sampling(n, B, scheme)).lr > lr), math.nan) for B in batches]
        axes.plot(batches, edges, label=label, zorder=3, **line_style(label))
    exact = [_crossing(sigmas, [lr_threshold(f, Sampling(n, B, scheme)).value for f in families], lr) for B in batches]
    axes.plot(batches, exact, label="exact threshold", zorder=3, **line_style("exact"))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("batch size $B$")
    axes.set_ylabel("coherence $\\sigma$")
    axes.set_title(f"stable (green) and unstable (red) cells at $\\eta$ = {lr:g}")
    axes.legend(fontsize=8, loc="upper right", frameon=True, framealpha=0.95)


def _crossing(sigmas: list[float], thresholds: list[float], lr: float) -> float:
    # The coherence at which the threshold passes lr, by interpolation in logarithms.
    for s0, s1, t0, t1 in zip(sigmas[:-1], sigmas[1:], thresholds[:-1], thresholds[1:], strict=True):
        if t0 < lr <= t1:
            share = math.log(lr / t0) / math.log(t1 / t0)
            return float(s0 * (s1 / s0) ** share)
    return math.nan if thresholds[0] < lr else sigmas[0]
