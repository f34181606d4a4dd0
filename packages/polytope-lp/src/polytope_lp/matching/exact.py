r"""HiGHS on the whole problem, where dual ascent makes no progress and the problem is small enough for it.

Its point is one more evaluation: its multipliers give a lower bound, and its amounts as the proximal center under a
ridge so large that the projection stays on it give the primal, which is repaired and certified like any other.
"""

import math
import time
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from polytope_lp.matching.evaluation import FusedDual
from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.matching.search import Search
from polytope_lp.matching.statistics import packing_rows, tight_limits
from polytope_lp.optimizers.highs import Point, solve_rows
from polytope_lp.serving.rounding import Rounded, round_allocation

Array = NDArray[np.float64]
WHOLE = 1e-9
"""What a number may be off a whole one."""
FRACTION = 0.01
"""A source whose amounts are all closer to whole ones is rounded to the nearest at first."""
MIP_TOLERANCE = 1e-6
"""What HiGHS allows a row to be exceeded by; rows that are not whole are tightened by as much."""
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
        for power in range(0, 16, 2):  # the bound rises along the ray forever
            search.objective(ray * 10.0**power * dual.unit / dual.scale)
    if found.status == "optimal":
        evaluate_at(search, found.x, found.lam[rows])
    search.engine = "dual"


def _rows(problem: MatchingProblem) -> tuple[scipy.sparse.csr_array, Array, NDArray[np.bool_]]:
    """The rows of the problem and then those of its blocks' cuts, their right-hand sides, and which are equations."""
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
    return scipy.sparse.csr_array(scipy.sparse.vstack([A, cuts])), b, equal


def evaluate_at(search: Search, x: Array, lam: Array) -> None:
    """Evaluate at a primal and dual pair that another solver found; the search ends if that certifies the gap.

    Args:
        search: A run without a process group.
        x: Amounts, shape (variables,), float64.
        lam: Multipliers, shape (rows,), float64.
    """
    dual = search.dual
    assert isinstance(dual, FusedDual)
    prices, amounts = torch.from_numpy(lam), torch.from_numpy(x)
    prices = torch.where(dual.free, prices, prices.clamp_min(0))
    if dual.repairable:
        amounts = torch.where(dual.problem.data.cost < 0, amounts, 0.0)  # what can pay nothing stays at zero
    search.engine = "highs"
    search.anchor = amounts.to(dual.problem.data.cost.dtype)
    search.gamma = HELD * dual.gamma_start
    search.objective(prices / dual.scale)
    search.engine = "dual"


def _point(problem: MatchingProblem, time_limit: float | None) -> tuple[Point, NDArray[np.int64]]:
    """HiGHS's point, and where among its rows those of the problem are."""
    n, (matrix, b, equal) = problem.data.variables, _rows(problem)
    order = np.argsort(equal, kind="stable")  # inequalities first
    cost, k = _costs(problem), int((~equal).sum())
    A = scipy.sparse.csr_array(matrix[order])
    found = solve_rows(cost, A, b[order], k, np.zeros(n), _upper(problem), time_limit)
    return found, np.argsort(order)[: problem.rows]


def _costs(problem: MatchingProblem) -> Array:
    # Where shrinking repairs, edges that cost stay at zero whatever they cost: "never" numbers would set HiGHS's scale.
    cost = problem.data.cost.double().numpy()
    return np.minimum(cost, 0.0) if problem.nonnegative and not problem.data.equality else cost


def _upper(problem: MatchingProblem) -> Array:
    d, n = problem.data, problem.data.variables
    return np.full(n, math.inf) if d.upper is None else np.broadcast_to(d.upper.double().numpy(), (n,))


def points_together(problems: list[MatchingProblem], units: list[float]) -> list[tuple[Array, Array]] | None:
    """HiGHS's points of several small problems in one call, which saves the fixed costs of a call for each.

    Args:
        problems: The problems.
        units: Size of the values of each, above 0.

    Returns:
        Amounts and multipliers of each; None where one of them has no optimum.
    """
    parts = [_rows(problem) for problem in problems]
    b, equal = (np.concatenate([part[k] for part in parts]) for k in (1, 2))
    order = np.argsort(equal, kind="stable")
    A = scipy.sparse.csr_array(scipy.sparse.block_diag([part[0] for part in parts], format="csr"))[order]
    cost = np.concatenate([_costs(p) / unit for p, unit in zip(problems, units, strict=True)])
    upper = np.concatenate([_upper(problem) for problem in problems])
    found = solve_rows(cost, A, b[order], int((~equal).sum()), np.zeros(cost.size), upper)
    if found.status != "optimal":
        return None
    lam = np.empty(b.size)
    lam[order] = found.lam
    rows, edges = (np.cumsum([part[0].shape[axis] for part in parts])[:-1] for axis in (0, 1))
    split = zip(problems, np.split(found.x, edges), np.split(lam, rows), units, strict=True)
    return [(x, prices[: problem.rows] * unit) for problem, x, prices, unit in split]


def whole_allocation(problem: MatchingProblem, amounts: Array, lam: Array, bound: float) -> Rounded:
    r"""The best whole amounts where every unit takes one from its destination's budget.

    Budgets, caps and bounds may then be rounded down, and the vertices of what is left are whole (a transport problem).
    An edge whose reduced cost exceeds the marginal one of its source by more than bound minus value is in no better
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
    if not takes_units(problem):
        raise ValueError("problem: expected one budget per edge, costs and weights of one, and inequalities only")
    d, n = problem.data, problem.data.variables
    start = round_allocation(problem, amounts, lam, bound)
    block = np.repeat(np.arange(d.blocks), np.diff(d.offsets.numpy()))
    cap = np.floor(np.broadcast_to(d.cap.numpy(), (d.blocks,)) + WHOLE)
    limit = _limits(problem)
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


def takes_units(problem: MatchingProblem) -> bool:
    """Whether every edge takes one unit from one budget, so that vertices are whole.

    Args:
        problem: The problem.

    Returns:
        Whether `whole_allocation` applies.
    """
    d = problem.data
    unit = d.coefficient is None or bool((d.coefficient == 1).all())
    return unit and d.index.ndim == 1 and d.weight is None and problem.nonnegative and not d.equality


def _limits(problem: MatchingProblem) -> Array:
    # Greatest whole amounts that sources and rows allow. The certified bound counts on both: an edge whose budget is
    # zero costs nothing there, at whatever price.
    d = problem.data
    rows = d.index.reshape(d.variables, -1).long()
    a = None if d.coefficient is None else d.coefficient.double().reshape(rows.shape)
    u = problem.limits(0, d.blocks)
    tight = tight_limits(rows, a, u, problem.budgets, packing_rows(problem))
    return np.asarray(np.floor((u if tight is None else tight).numpy() + WHOLE))


def _marginal(reduced: Array, block: NDArray[np.int64], limit: Array, cap: Array, *, filled: bool = False) -> Array:
    # Reduced cost of the last unit that each edge's source takes at these prices; 0 where its cap is not used up.
    # A source that must be `filled` takes its best edges whatever they cost.
    order = np.lexsort((reduced, block))
    amount = limit if filled else np.where(reduced < 0, limit, 0.0)
    take = amount[order]
    total = np.bincount(block, amount, cap.size)
    before = np.cumsum(take) - take
    first = np.searchsorted(block[order], np.arange(cap.size))
    before -= before[np.minimum(first, before.size - 1)][block[order]]
    last = np.full(cap.size, -np.inf)
    inside = (take > 0) & (before < cap[block[order]])
    np.maximum.at(last, block[order][inside], reduced[order][inside])
    return np.where(total >= cap, np.where(np.isfinite(last), last, 0.0), 0.0)[block]


def whole_within_rows(
    problem: MatchingProblem, amounts: Array, lam: Array, bound: float, *, exact: bool, time_limit: float = 60.0
) -> Rounded:
    r"""Whole amounts where rounding down is not safe: minimums, equations, signs mixed, sources that must be filled.

    Sources whose amounts are whole already keep them, and the others are decided by an integer program (HiGHS) within
    what is left of the rows. Where that has no solution, the sources that lose least by another choice join them, twice
    as many every time. `exact`: then all edges that can be in a better allocation are decided at once; an edge whose
    reduced cost lies above the marginal one of its source by more than bound minus value is in none.

    Args:
        problem: A whole problem.
        amounts: An allocation, shape (variables,), float64.
        lam: Prices, shape (rows,), float64.
        bound: Certified upper bound of the value of any allocation.
        exact: Whether the best whole allocation is wanted, with a proof.
        time_limit: Seconds for all integer programs.

    Returns:
        The whole amounts, feasible; `proved` if no whole allocation is worth more.

    Raises:
        ValueError: If the problem is a shard, or no whole allocation was found.
    """
    if problem.sharded:
        raise ValueError("problem: expected a whole problem, got the shard of one rank")
    started, d = time.monotonic(), problem.data
    matrix, b, equal = _rows(problem)
    columns = scipy.sparse.csc_array(matrix)
    block = np.repeat(np.arange(d.blocks), np.diff(d.offsets.numpy()))
    cost, limit = d.cost.double().numpy(), _limits(problem)
    whole_rows = _whole_rows(matrix)
    nearest = np.clip(np.round(amounts), 0.0, limit)
    off = np.zeros(d.blocks)
    np.maximum.at(off, block, np.abs(amounts - nearest))
    reduced = cost + _priced(problem, lam)
    cap = np.broadcast_to(d.cap.numpy(), (d.blocks,))
    extra = np.abs(reduced - _marginal(reduced, block, limit, cap, filled=d.equality))
    extra[nearest > 0] = np.inf
    regret = np.full(d.blocks, np.inf)
    np.minimum.at(regret, block, extra)
    regret[off > FRACTION] = -1.0
    order, count = np.argsort(regret, kind="stable"), int((off > FRACTION).sum())

    def decide(free: NDArray[np.bool_], fixed: Array) -> tuple[Array | None, float]:
        left = time_limit - (time.monotonic() - started)
        return _decide(columns, b, equal, whole_rows, cost, limit, free, fixed, max(left, 0.1))

    x: Array | None = None
    while x is None and time.monotonic() - started < time_limit:
        free = np.zeros(d.blocks, dtype=bool)
        free[order[:count]] = True
        x, _ = decide(free[block], nearest)
        if count >= d.blocks:
            break
        count = min(max(2 * count, 16), d.blocks)
    if x is None:
        raise ValueError(f"problem: no whole allocation within all rows was found in {time_limit:.0f} s")
    changed = int((off > WHOLE).sum())
    reach = bound
    if exact:
        spare = bound + float(cost @ x) + 1e-9 * abs(bound)
        beyond = reduced - _marginal(reduced, block, limit, cap, filled=d.equality) > spare
        better, most = decide(~beyond, np.zeros(d.variables))
        if better is not None and float(cost @ better) <= float(cost @ x):
            x = better
        reach = min(bound, max(most, -float(cost @ x)))  # allocations with any other edge are worth less than x
    value = -float(cost @ x)
    load = np.asarray(matrix[: problem.rows] @ x, dtype=np.float64)
    return Rounded(x, value, reach, load, changed, bool(value >= reach - 1e-9 * abs(reach)))


def _priced(problem: MatchingProblem, lam: Array) -> Array:
    """A'lambda, shape (variables,)."""
    rows = problem.data.index.numpy().reshape(problem.data.variables, -1)
    a = 1.0 if problem.data.coefficient is None else problem.data.coefficient.double().numpy().reshape(rows.shape)
    return np.asarray((a * lam[rows]).sum(1))


def _whole_rows(matrix: scipy.sparse.csr_array) -> NDArray[np.bool_]:
    """Rows with whole coefficients, whose right-hand sides may be rounded to whole numbers."""
    odd = scipy.sparse.csr_array((matrix.data != np.round(matrix.data), matrix.indices, matrix.indptr), matrix.shape)
    return np.equal(np.asarray(odd.sum(axis=1)).ravel(), 0)


def _decide(
    columns: scipy.sparse.csc_array,
    b: Array,
    equal: NDArray[np.bool_],
    whole_rows: NDArray[np.bool_],
    cost: Array,
    limit: Array,
    free: NDArray[np.bool_],
    fixed: Array,
    time_limit: float,
) -> tuple[Array | None, float]:
    """The best whole amounts of the free edges beside the fixed ones, or None; and what they are worth at most."""
    x = np.where(free, 0.0, fixed)
    kept, left = np.flatnonzero(free), b - columns @ x
    high = np.where(whole_rows, np.floor(left + WHOLE), left - MIP_TOLERANCE * np.abs(b))
    high = np.where(equal, left, high)
    if kept.size:
        A = scipy.sparse.csr_array(columns[:, kept])
        used = np.diff(A.indptr) > 0
        chosen = scipy.sparse.csr_matrix(A[used])  # of a csr_array, old scipy would hand HiGHS 64-bit indices
        rows = LinearConstraint(chosen, np.where(equal, left, -np.inf)[used], high[used])
        options: Any = {"time_limit": time_limit, "mip_rel_gap": 0.0}
        found = milp(
            cost[kept],
            integrality=np.ones(kept.size, dtype=np.int64),
            bounds=Bounds(0.0, limit[kept]),
            constraints=rows,
            options=options,
        )
        if found.x is None:
            return None, math.inf
        x[kept] = np.round(found.x)
        most = -float(found.mip_dual_bound) if found.mip_dual_bound is not None else math.inf
    else:
        most = -float(cost @ x)
    over = columns @ x - b
    room = WHOLE * np.maximum(np.abs(b), 1.0)
    feasible = bool((np.where(equal, np.abs(over), over) <= room).all())
    feasible = feasible and bool(((x >= 0.0) & (x <= limit)).all())  # HiGHS before scipy 1.17: -1 within [0, 1]
    return (x, most - float(cost[~free] @ x[~free])) if feasible else (None, math.inf)
