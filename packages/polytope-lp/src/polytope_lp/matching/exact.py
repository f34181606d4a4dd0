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
