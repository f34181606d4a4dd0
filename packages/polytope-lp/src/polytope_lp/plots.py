"""Pictures of a solution: how the bounds met, and what the budgets cost."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from core_tensor.app import figures

EXTRA = "polytope-lp[plot]"
INK, BLUE, ORANGE, GREY = "#222222", "#2166ac", "#d6604d", "#999999"


def picture(history: pa.Table, prices: pa.Table, path: str | Path, title: str) -> Path:
    """Draw the gap over the evaluations, and prices against the use of the budgets.

    Args:
        history: One row per evaluation, as in `history.parquet`.
        prices: What `Solution.prices` gives.
        path: Image to write.
        title: What is above the first picture.

    Returns:
        The path.
    """
    plt = figures.pyplot(EXTRA)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    convergence(left, history.to_pylist(), title)
    price_by_use(right, prices)
    figures.save(figure, path)
    return Path(path)


def convergence(a: Any, history: list[dict[str, Any]], title: str) -> None:
    """Certified gap, cost of the ridge and violation by evaluation; a dotted line where the ridge changes.

    Args:
        a: Matplotlib axes.
        history: One entry per evaluation.
        title: Title of the axes.
    """
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
    a.set(xlabel="evaluations of the dual", ylabel="relative", title=title)
    a.legend()
    a.grid(alpha=0.2)


def price_by_use(a: Any, prices: pa.Table) -> None:
    """Price of every destination against the part of its budget that is used.

    Args:
        a: Matplotlib axes.
        prices: What `Solution.prices` gives.
    """
    budget, load, price = (np.asarray(prices.column(name), dtype=np.float64) for name in ("budget", "load", "price"))
    used, binding = load / np.where(budget > 0, budget, 1.0), price > 0
    free = ~binding
    a.scatter(used[free], price[free], s=10, color=GREY, alpha=0.6, label=f"{free.sum()} free budgets")
    a.scatter(used[binding], price[binding], s=10, color=BLUE, label=f"{binding.sum()} budgets with a price")
    a.set(xlabel="part of the budget used", ylabel="price λ (value per unit of budget)", title="Prices")
    a.set_yscale("symlog", linthresh=float(np.median(price[binding])) / 10 if binding.any() else 1.0)
    a.legend()
    a.grid(alpha=0.2)
