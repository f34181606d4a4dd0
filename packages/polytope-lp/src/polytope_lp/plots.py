"""Pictures of a solution: how the bounds met, and what the budgets cost."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from core_tensor.app.extras import pyplot
from core_tensor.app.files import atomic_path

from polytope_lp.matching.solution import Solution

INK, BLUE, ORANGE, GREY = "#222222", "#2166ac", "#d6604d", "#999999"


def picture(solution: Solution, path: str | Path) -> Path:
    """Draw the gap over the evaluations, and prices against the use of the budgets.

    Args:
        solution: A solution with a certified gap.
        path: Image to write.

    Returns:
        The path.
    """
    plt = pyplot("polytope-lp[plot]")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    convergence(left, solution)
    prices(right, solution)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)
    return Path(path)


def convergence(a: Any, solution: Solution) -> None:
    """Certified gap, cost of the ridge and violation by evaluation; a dotted line where the ridge changes.

    Args:
        a: Matplotlib axes.
        solution: The solution.
    """
    history = solution.history
    at = np.array([h["evaluation"] for h in history])
    gap = np.array([np.nan if h["gap"] is None else h["gap"] for h in history])
    plot = a.semilogy
    plot(at, gap, color=BLUE, lw=2, label="certified gap")
    plot(at, [max(h["smoothing"], 1e-16) for h in history], color=ORANGE, lw=1.2, label="cost of the ridge")
    plot(at, [max(h["violation"], 1e-16) for h in history], color=GREY, lw=1, label="violation before repair")
    for before, after in pairwise(history):
        if before["gamma"] != after["gamma"]:
            a.axvline(after["evaluation"], color=INK, lw=0.8, ls=":")
            a.text(
                after["evaluation"],
                0.985,
                f" γ={after['gamma']:.0e}",
                fontsize=8,
                color=INK,
                va="top",
                transform=a.get_xaxis_transform(),
            )
    a.set(
        xlabel="evaluations of the dual",
        ylabel="relative",
        title=f"{solution.problem.data.variables:,} edges, gap {solution.gap:.1e}",
    )
    a.legend(frameon=False)
    a.grid(alpha=0.2)


def prices(a: Any, solution: Solution) -> None:
    """Price of every destination against the part of its budget that is used.

    Args:
        a: Matplotlib axes.
        solution: The solution.
    """
    budget = solution.problem.budgets.numpy()
    used = solution.load.numpy() / np.where(budget > 0, budget, 1.0)
    binding = solution.lam.numpy() > 0
    a.scatter(
        used[~binding],
        solution.lam.numpy()[~binding],
        s=10,
        color=GREY,
        alpha=0.6,
        label=f"{(~binding).sum()} free budgets",
    )
    a.scatter(
        used[binding], solution.lam.numpy()[binding], s=10, color=BLUE, label=f"{binding.sum()} budgets with a price"
    )
    a.set(
        xlabel="part of the budget used", ylabel="price λ (value per unit of budget)", title="Prices", yscale="symlog"
    )
    a.set_yscale(
        "symlog", linthresh=max(float(np.median(solution.lam[solution.lam > 0])) / 10, 1e-9) if binding.any() else 1.0
    )
    a.legend(frameon=False)
    a.grid(alpha=0.2)
