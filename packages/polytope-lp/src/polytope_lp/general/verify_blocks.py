r"""Independent recomputation of what a `BlockSolution` claims.

Bounds and rows are checked by sums; membership in a polytope that is known by its oracle is decided by linear programs
over the vertices that the oracle names (HiGHS, column generation on $\min \lVert V'w - x \rVert_1$), not by the
corral that projected; lower bounds by the fractional knapsack or by the oracle itself.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from polytope_lp.general.block_lp import BlockLP, Bounds, Group
from polytope_lp.matching.verify import capped_excess, capped_least
from polytope_lp.polytopes import CappedBox

if TYPE_CHECKING:
    from polytope_lp.general.block_solution import BlockSolution

Array = NDArray[np.float64]


def verify_blocks(solution: "BlockSolution") -> dict[str, Any]:
    """Recompute bounds, rows and blocks, and compare them with the claims.

    Args:
        solution: The solution.

    Returns:
        `ok`, the recomputed figures, and `problems`: one line for every claim that does not hold.
    """
    lp, x, lam = solution.problem, solution.x, solution.lam
    failures: list[str] = []

    def require(holds: bool, line: str) -> None:
        if not holds:
            failures.append(line)

    if solution.status == "infeasible":
        proved = solution.ray is not None and _least(lp, lp.A.T @ solution.ray) - float(solution.ray @ lp.b) > 0
        require(proved, "the ray does not prove infeasibility")
        return {"ok": not failures, "problems": failures}
    objective, block = float(lp.c @ x), max((_outside(g, x[at]) for at, g in lp.pieces()), default=0.0)
    lower = _least(lp, lp.c + lp.A.T @ lam) - float(lam @ lp.b)
    violation = float((lp.excess(x) / (1 + np.abs(lp.b) + abs(lp.A) @ np.abs(x))).max(initial=0.0))
    size = max(1.0, abs(objective))
    require(block <= 1e-7, f"a block leaves its polytope by {block:.3e}")
    require(bool((lam[: lp.inequalities] >= 0).all()), "a multiplier of an inequality is negative")
    require(abs(objective - solution.objective) <= 1e-9 * size, f"the objective is {objective!r}")
    require(violation <= solution.max_violation + 1e-12, f"a row is violated by {violation:.3e}")
    require(
        not np.isfinite(solution.lower_bound) or lower >= solution.lower_bound - 1e-9 * size,
        f"the lower bound is {lower!r}, below the {solution.lower_bound!r} claimed",
    )
    if np.isfinite(solution.upper_bound):
        require(bool((lp.excess(x) <= 1e-12 * (1 + np.abs(lp.b))).all()), "the primal is not feasible")
    return {
        "ok": not failures,
        "problems": failures,
        "objective": objective,
        "lower_bound": lower,
        "max_violation": violation,
        "block_violation": block,
    }


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
