r"""Independent recomputation of what a `BlockSolution` claims.

Bounds and rows are checked by sums; membership in a polytope that is known by its oracle is decided by linear programs
over the vertices that the oracle names (HiGHS, column generation on $\min \lVert V'w - x \rVert_1$), not by the
corral that projected; lower bounds by the fractional knapsack or by the oracle itself.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from polytope_lp.general.block_lp import BlockLP, Bounds, Group
from polytope_lp.matching.verify import capped_excess, capped_least
from polytope_lp.polytopes import CappedBox

Array = NDArray[np.float64]
STATUSES = ("optimal", "optimal_residual", "infeasible", "unbounded", "time_limit", "stalled")


def verify_blocks(lp: BlockLP, x: Array, lam: Array, ray: Array | None, claims: dict[str, Any]) -> dict[str, Any]:
    """Recompute bounds, rows and blocks, and compare them with the claims.

    Args:
        lp: The LP.
        x: The primal, shape (n,).
        lam: Multipliers, inequalities first, shape (m,).
        ray: What proves that there is no optimum, or None.
        claims: What `BlockSolution.certificate` gives.

    Returns:
        `ok`, the recomputed figures, and `problems`: one line for every claim that does not hold.
    """
    failures: list[str] = []

    def require(holds: bool, line: str) -> None:
        if not holds:
            failures.append(line)

    status, tol = claims["status"], claims["tol"]
    require(status in STATUSES, f"status: expected one of {', '.join(STATUSES)}, got {status!r}")
    if status == "infeasible":
        require(ray is not None and _proves_infeasible(lp, lp.signed(ray)), "the ray does not prove infeasibility")
        return {"ok": not failures, "problems": failures}
    objective, block = float(lp.c @ x), max((_outside(g, x[at]) for at, g in lp.pieces()), default=0.0)
    lower = _least(lp, lp.c + lp.A.T @ lam) - float(lam @ lp.b)
    violation = float((lp.excess(x) / (1 + np.abs(lp.b) + abs(lp.A) @ np.abs(x))).max(initial=0.0))
    term = max((abs(float(p)) for p in lp.c * x), default=0.0)
    size = max(term, abs(objective)) or 1.0
    claimed_lower = -np.inf if claims["lower_bound"] is None else claims["lower_bound"]
    require(block <= 1e-7, f"a block leaves its polytope by {block:.3e}")
    require(bool((lam[: lp.inequalities] >= 0).all()), "a multiplier of an inequality is negative")
    require(
        claims["objective"] is not None and abs(objective - claims["objective"]) <= 1e-9 * size,
        f"the objective is {objective!r}",
    )
    require(
        claims["max_violation"] is not None and abs(violation - claims["max_violation"]) <= 1e-9 * max(1.0, violation),
        f"a row is violated by {violation:.3e}, not {claims['max_violation']!r}",
    )
    require(lower >= claimed_lower - 1e-9 * size, f"the lower bound is {lower!r}, below the {claimed_lower!r} claimed")
    gap = abs(float(lam @ (lp.A @ x - lp.b))) / size
    if claims["upper_bound"] is not None:
        require(bool((lp.excess(x) <= 1e-12 * (1 + np.abs(lp.b))).all()), "the primal is not feasible")
        require(abs(claims["upper_bound"] - objective) <= 1e-9 * size, f"the upper bound is {objective!r}")
        if np.isfinite(lower):
            gap = (objective - lower) / (max(term, abs(lower)) or 1.0)
    require(
        claims["gap"] is not None and abs(gap - claims["gap"]) <= 1e-9 * max(1.0, abs(gap)),
        f"the gap is {gap:.3e}, not {claims['gap']!r}",
    )
    if status in {"optimal", "optimal_residual"}:
        claimed = [claims[name] for name in ("gap", "max_violation", "dual_residual")]
        require(None not in claimed and max(claimed) <= tol, f"{status}: what is claimed is not within tol, {tol:.3e}")
        within = max(gap, violation, _slackness(lp, x, lam) if claims["upper_bound"] is None else 0.0)
        require(within <= 10 * tol + 1e-9, f"{status}: gap, violation and slackness reach {within:.3e}, not {tol:.3e}")
        require(status != "optimal" or claims["upper_bound"] is not None, "optimal: expected an upper bound, got none")
    if status == "unbounded":
        require(ray is not None and _falls_for_ever(lp, ray), "the ray does not prove that the objective is unbounded")
        require(violation <= tol, f"unbounded: the point violates a row by {violation:.3e}")
    return {
        "ok": not failures,
        "problems": failures,
        "objective": objective,
        "lower_bound": lower,
        "max_violation": violation,
        "block_violation": block,
    }


def _proves_infeasible(lp: BlockLP, ray: Array) -> bool:
    # The dual at zero costs is above zero; where a variable has no bound, products that cancel up to rounding count as
    # zero.
    reduced = lp.A.T @ ray
    cancelled = np.abs(reduced) <= 1e-13 * (abs(lp.A.T) @ np.abs(ray))
    for at, group in lp.pieces():
        if isinstance(group.kind, Bounds):
            open_ = np.isinf(group.kind.lower) | np.isinf(group.kind.upper)
            reduced[at] = np.where(cancelled[at] & open_, 0.0, reduced[at])
    return _least(lp, reduced) - float(ray @ lp.b) > 0


def _slackness(lp: BlockLP, x: Array, lam: Array) -> float:
    # What is lost by x against the best point of the blocks at these prices, relative to the objective; on a side
    # without a bound, the reduced cost of the wrong sign relative to its terms.
    reduced = lp.c + lp.A.T @ lam
    lost, wrong = 0.0, 0.0
    terms = np.abs(lp.c) + abs(lp.A.T) @ np.abs(lam)
    for at, group in lp.pieces():
        r, mine = reduced[at], x[at]
        if isinstance(group.kind, Bounds):
            side = np.where(r > 0, group.kind.lower, group.kind.upper)
            open_ = np.isinf(side)
            lost += float((r * (mine - np.where(open_, mine, side))).sum())
            wrong = max(wrong, float((np.abs(r) / (1 + terms[at]))[open_].max(initial=0.0)))
        else:
            part = BlockLP(r, lp.A[:0, at], np.zeros(0), 0, (group,))
            lost += float(r @ mine) - _least(part, r)
    return max(lost / (max(float(np.abs(lp.c * x).max(initial=0.0)), abs(float(lp.c @ x))) or 1.0), wrong)


def _falls_for_ever(lp: BlockLP, ray: Array) -> bool:
    # Whether a direction lowers the objective and leaves neither rows nor blocks, up to rounding.
    size = float(np.abs(ray).max(initial=0.0))
    box = lp.box()
    if size == 0.0 or box is None:
        return False
    lower, upper = box
    d = ray / size
    inside = bool((d[np.isfinite(upper)] <= 1e-9).all() and (d[np.isfinite(lower)] >= -1e-9).all())
    k, slope = lp.inequalities, lp.A @ d
    summed = 1e-9 * (1 + abs(lp.A) @ np.abs(d))
    rows = bool((slope[:k] <= summed[:k]).all() and (np.abs(slope[k:]) <= summed[k:]).all())
    return inside and rows and float(lp.c @ d) < -1e-9 * float(np.abs(lp.c) @ np.abs(d))


def _least(lp: BlockLP, reduced: Array) -> float:
    total = 0.0
    for at, group in lp.pieces():
        r, kind = reduced[at], group.kind
        if isinstance(kind, Bounds):
            with np.errstate(invalid="ignore"):
                each = np.where(r > 0, r * kind.lower, r * kind.upper)
            total += float(each[r != 0].sum())
        elif isinstance(kind, CappedBox):
            total += capped_least(r, group.offsets, *_parameters(kind, group), kind.equality)
        else:
            best = _oracle(kind)
            total += sum(float(r[a:b] @ best(-r[a:b])) for a, b in pairwise(group.offsets.tolist()) if b > a)
    return total


def _outside(group: Group, x: Array) -> float:
    kind = group.kind
    if isinstance(kind, Bounds):
        return float(np.maximum(kind.lower - x, x - kind.upper).max(initial=0.0))
    if isinstance(kind, CappedBox):
        return capped_excess(x, group.offsets, *_parameters(kind, group), kind.equality)
    best = _oracle(kind)
    return max((hull_distance(best, x[a:b]) for a, b in pairwise(group.offsets.tolist()) if b > a), default=0.0)


def _oracle(kind: Any) -> Callable[[Array], Array]:
    if not hasattr(kind, "best"):
        raise TypeError(f"{type(kind).__name__}: expected a vertex oracle `best`")
    found: Callable[[Array], Array] = kind.best
    return found


def _parameters(kind: CappedBox, group: Group) -> tuple[Array, Array, Array]:
    # Caps by block, upper bounds and weights by variable.
    cap, upper, weight = kind.parameters()
    n = group.variables
    return (
        np.broadcast_to(cap.numpy(), (group.offsets.size - 1,)),
        np.full(n, np.inf) if upper is None else np.broadcast_to(upper.numpy(), (n,)),
        np.ones(n) if weight is None else weight.numpy(),
    )


def hull_distance(best: Callable[[Array], Array], x: Array, tol: float = 1e-10) -> float:
    """Distance of a point from the hull of an oracle's vertices, by column generation.

    Args:
        best: Vertex that maximizes a direction's inner product.
        x: The point, shape (n,).
        tol: Distance and improvement below which to stop.

    Returns:
        The distance in the 1-norm, exact up to `tol`.
    """
    n = x.size
    V = best(2.0 * x - float(x.max(initial=0.0)))[None, :]
    while True:
        k = V.shape[0]
        A = np.block([[V.T, np.eye(n), -np.eye(n)], [np.ones((1, k)), np.zeros((1, 2 * n))]])
        cost = np.concatenate([np.zeros(k), np.ones(2 * n)])
        found = linprog(cost, A_eq=A, b_eq=np.append(x, 1.0), method="highs")
        direction, price = found.eqlin.marginals[:n], found.eqlin.marginals[n]
        q = best(direction)
        distance = float(found.fun or 0.0)
        if distance <= tol or float(direction @ q) + price <= tol or (q == V).all(1).any():
            return distance
        V = np.vstack([V, q])
