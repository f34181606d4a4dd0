r"""HiGHS on the whole problem, where dual ascent makes no progress and the problem is small enough for it.

Its point is one more evaluation: its multipliers give a lower bound, and its amounts as the proximal center under a
ridge so large that the projection stays on it give the primal, which is repaired and certified like any other.
"""

import math

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from polytope_lp.matching.evaluation import FusedDual
from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.matching.search import Search
from polytope_lp.optimizers.highs import Point, solve_rows
from polytope_lp.serving.rounding import Rounded, round_allocation

Array = NDArray[np.float64]
WHOLE = 1e-9
"""What a number may be off a whole one."""

HELD = 1e12
"""Ridge, in units of `gamma_start`, at which a projection stays where its center is."""


def finish(search: Search) -> None:
    """Evaluate at HiGHS's point; the search ends if that certifies the gap, or that there is no feasible point.

    Args:
        search: A run without a process group.
    """
    dual, limit = search.dual, search.options.time_limit
    if not isinstance(dual, FusedDual) or dual.group is not None:
        return
    left = None if limit is None else max(limit - search.before - dual.elapsed(), 1.0)
    found, rows = _point(dual.problem, left)
    search.engine = "highs"
    free = dual.free
    if found.status == "infeasible" and found.ray is not None:
        ray = torch.from_numpy(found.ray[rows])
        ray = torch.where(free, ray, ray.clamp_min(0)) / max(float(ray.abs().max()), 1e-300)
        for power in range(0, 16, 2):  # the bound rises along the ray without end
            search.objective(ray * 10.0**power * dual.unit / dual.scale)
    if found.status == "optimal":
        lam = torch.from_numpy(found.lam[rows])
        lam = torch.where(free, lam, lam.clamp_min(0))
        x = torch.from_numpy(found.x)
        if dual.repairable:
            x = torch.where(dual.problem.data.cost < 0, x, 0.0)  # what can pay nothing stays at zero
        search.anchor = x.to(dual.problem.data.cost.dtype)
        search.gamma = HELD * dual.gamma_start
        search.objective(lam / dual.scale)
    search.engine = "dual"


def _point(problem: MatchingProblem, time_limit: float | None) -> tuple[Point, NDArray[np.int64]]:
    """HiGHS's point, and where among its rows those of the problem are."""
    d, n, m = problem.data, problem.data.variables, problem.rows
    rows = d.index.numpy().reshape(n, -1)
    a = np.ones(rows.shape) if d.coefficient is None else d.coefficient.double().numpy().reshape(rows.shape)
    at = (rows.ravel(), np.repeat(np.arange(n), rows.shape[1]))
    A = scipy.sparse.csr_array((a.ravel(), at), shape=(m, n))
    cap = np.broadcast_to(d.cap.numpy(), (d.blocks,))
    block = np.repeat(np.arange(d.blocks), np.diff(d.offsets.numpy()))
    weight = np.ones(n) if d.weight is None else d.weight.double().numpy()
    cuts = scipy.sparse.csr_array((weight, (block, np.arange(n))), shape=(d.blocks, n))[np.isfinite(cap)]
    equal = np.concatenate([problem.equality.numpy(), np.full(cuts.shape[0], d.equality)])
    b = np.concatenate([problem.budgets.numpy(), cap[np.isfinite(cap)]])
    order = np.argsort(equal, kind="stable")  # inequalities first
    matrix = scipy.sparse.csr_array(scipy.sparse.vstack([A, cuts]))[order]
    upper = np.full(n, math.inf) if d.upper is None else np.broadcast_to(d.upper.double().numpy(), (n,))
    cost = d.cost.double().numpy()
    found = solve_rows(cost, matrix, b[order], int((~equal).sum()), np.zeros(n), upper, time_limit)
    return found, np.argsort(order)[:m]


def whole_allocation(problem: MatchingProblem, amounts: Array, lam: Array, bound: float) -> Rounded:
    r"""The best whole amounts where every unit takes one from its destination's budget.

    Budgets, caps and bounds may then be rounded down, and the vertices of what is left are whole (a transport problem).
    An edge whose reduced cost lies above the marginal one of its source by more than bound minus value is in no better
    allocation, so few edges remain, on which HiGHS finds a vertex; its multipliers bound those, and so all.

    Args:
        problem: A whole problem with A, b >= 0 and inequalities, one row per edge, coefficients and weights of one.
        amounts: An allocation, within budgets and blocks, shape (variables,), float64.
        lam: Prices, shape (rows,), float64.
        bound: Certified upper bound of the value of any allocation.

    Returns:
        The whole amounts, and whether they are proved best.

    Raises:
        ValueError: If the problem is of another kind, or HiGHS finds no vertex.
    """
    d, n = problem.data, problem.data.variables
    unit = d.coefficient is None or bool((d.coefficient == 1).all())
    if not (unit and d.index.ndim == 1 and d.weight is None and problem.nonnegative and not d.equality):
        raise ValueError("problem: expected one budget per edge, costs and weights of one, and inequalities only")
    start = round_allocation(problem, amounts, lam, bound)
    block = np.repeat(np.arange(d.blocks), np.diff(d.offsets.numpy()))
    cap = np.floor(np.broadcast_to(d.cap.numpy(), (d.blocks,)) + WHOLE)
    limit = np.floor(problem.limits(0, d.blocks).numpy() + WHOLE)
    budgets, cost, row = np.floor(problem.budgets.numpy() + WHOLE), d.cost.double().numpy(), d.index.numpy()
    reduced = cost + lam[row]
    spare = bound - start.value + 1e-9 * abs(bound)
    kept = np.flatnonzero((reduced - _marginal(reduced, block, limit, cap) <= spare) & (cost < 0) & (limit > 0))
    at = (np.concatenate([row[kept], problem.rows + block[kept]]), np.tile(np.arange(kept.size), 2))
    shape = (problem.rows + d.blocks, kept.size)
    A, b = scipy.sparse.csr_array((np.ones(2 * kept.size), at), shape=shape), np.concatenate([budgets, cap])
    finite = np.isfinite(b)
    found = solve_rows(cost[kept], A[finite], b[finite], int(finite.sum()), np.zeros(kept.size), limit[kept])
    x = np.zeros(n)
    x[kept] = np.round(found.x)
    used, taken = np.bincount(row, x, problem.rows), np.bincount(block, x, d.blocks)
    if found.status != "optimal" or (used > budgets).any() or (taken > cap).any():
        raise ValueError(f"problem: HiGHS found no vertex of its {kept.size} edges ({found.status})")
    # Weak duality on the kept edges; allocations with any other edge are worth no more than `start`.
    price = np.maximum(found.lam, 0.0)
    left = np.maximum(-cost[kept] - A[finite].T @ price, 0.0)
    least = min(bound, max(start.value, float(b[finite] @ price) + float(limit[kept] @ left)))
    value = max(start.value, -float(cost @ x))
    x = x if value > start.value else start.x
    whole_values = bool((cost == np.round(cost)).all())
    reach = np.floor(least + 1e-6) if whole_values else least * (1.0 - 1e-9)
    load = np.asarray(np.bincount(row, x, problem.rows), dtype=np.float64)
    return Rounded(x, value, least, load, start.changed, bool(value >= reach))


def _marginal(reduced: Array, block: NDArray[np.int64], limit: Array, cap: Array) -> Array:
    """Reduced cost of the last unit that each edge's source takes at these prices; 0 where its cap is not used up."""
    order = np.lexsort((reduced, block))
    take = np.where(reduced[order] < 0, limit[order], 0.0)
    total = np.bincount(block, np.where(reduced < 0, limit, 0.0), cap.size)
    before = np.cumsum(take) - take
    first = np.searchsorted(block[order], np.arange(cap.size))
    before -= before[np.minimum(first, before.size - 1)][block[order]]
    last = np.full(cap.size, -np.inf)
    inside = (take > 0) & (before < cap[block[order]])
    np.maximum.at(last, block[order][inside], reduced[order][inside])
    return np.where(total >= cap, np.where(np.isfinite(last), last, 0.0), 0.0)[block]
