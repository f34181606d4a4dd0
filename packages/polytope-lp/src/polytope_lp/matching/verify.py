r"""Independent recomputation of a solution's claims: numpy, float64, formulas of its own, no kernel of the solver.

For every run of blocks it checks $x_i \in C_i$, sums $A x$ and $c'x$ from the exported primal, and sums
$\min_{v \in C_i} (c_i + A_i'\lambda)'v$ by filling the fractional knapsack; then
$\text{lower} = \sum_i \min - \lambda'b$ with $\lambda \ge 0$ on inequality rows.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from polytope_lp.matching.problem import MatchingProblem

if TYPE_CHECKING:
    from polytope_lp.matching.solution import Solution

Array = NDArray[np.float64]


def verify_solution(solution: "Solution") -> dict[str, Any]:
    """Verify a solution in memory against its problem.

    Args:
        solution: The solution.

    Returns:
        See `check_claims`.
    """
    return check_claims(solution.problem, solution.x().numpy(), solution.lam.numpy(), solution.certificate())


def check_claims(problem: MatchingProblem, x: Array, lam: Array, claims: dict[str, Any]) -> dict[str, Any]:
    """Recompute bounds and feasibility and compare them with a certificate.

    Args:
        problem: The whole problem.
        x: The primal, shape (variables,), float64.
        lam: The prices, shape (rows,), float64.
        claims: Status, bounds, gap and violation as `Solution.certificate` gives them.

    Returns:
        `ok`, the recomputed figures, and `problems`: one line for every claim that does not hold.
    """
    b, free = problem.budgets.numpy(), problem.equality.numpy()
    found = recompute(problem, x, lam)
    size = max(1.0, abs(found["lower_bound"]))
    slack = 1e-9 * size
    failures = []

    def require(holds: bool, line: str) -> None:
        if not holds:
            failures.append(line)

    require(found["block_violation"] <= 1e-9, f"a block leaves its polytope by {found['block_violation']:.3e}")
    require(bool((lam[~free] >= 0).all()), "a price of an inequality is negative")
    require(
        abs(found["objective"] - claims["objective"]) <= slack,
        f"the objective is {found['objective']!r}, not {claims['objective']!r}",
    )
    require(
        found["lower_bound"] >= claims["lower_bound"] - slack,
        f"the lower bound is {found['lower_bound']!r}, below the {claims['lower_bound']!r} claimed",
    )
    excess = np.where(free, np.abs(found["load"] - b), found["load"] - b) / (1 + np.abs(b))
    violation = max(float(excess.max(initial=0.0)), 0.0)
    require(violation <= claims["max_violation"] + 1e-9, f"a row is violated by {violation:.3e} relative to 1 + |b|")
    require(
        claims["status"] != "infeasible" or found["lower_bound"] > found["greatest"],
        f"infeasible: the lower bound {found['lower_bound']!r} is not above {found['greatest']!r}, the most of c'x",
    )
    gap = None
    if claims["upper_bound"] is not None:
        require(violation <= 1e-12, f"the primal is not feasible: a row is exceeded by {violation:.3e}")
        gap = (found["objective"] - found["lower_bound"]) / size
        require(gap <= claims["gap"] + 1e-9, f"the gap is {gap:.3e}, not {claims['gap']:.3e}")
        require(gap >= -1e-9, f"the objective lies below the lower bound by {-gap:.3e}")
    return {
        "ok": not failures,
        "problems": failures,
        "objective": found["objective"],
        "lower_bound": found["lower_bound"],
        "gap": gap,
        "max_violation": violation,
        "block_violation": found["block_violation"],
    }


def recompute(problem: MatchingProblem, x: Array, lam: Array) -> dict[str, Any]:
    """Objective, load, lower bound and block violation, run of blocks by run of blocks.

    Args:
        problem: The problem.
        x: The primal, shape (variables,), float64.
        lam: The prices, shape (rows,), float64.

    Returns:
        `objective`, `load`, `lower_bound`, `block_violation`, and `greatest`, the most that c'x can be in the blocks.
    """
    load, objective, least, worst, most = np.zeros(problem.rows), 0.0, 0.0, 0.0, 0.0
    origin = int(problem.data.offsets[0])
    for begin, end in problem.pieces(1 << 20):
        part = problem.slice(begin, end)
        starts = (part.offsets - part.offsets[0]).numpy()
        mine = x[int(part.offsets[0]) - origin : int(part.offsets[-1]) - origin]
        cost = part.cost.numpy().astype(np.float64)
        rows = part.index.numpy().reshape(part.variables, -1)
        a = np.ones(rows.shape) if part.coefficient is None else part.coefficient.numpy().reshape(rows.shape)
        a = a.astype(np.float64)
        objective += float(cost @ mine)
        load += np.bincount(rows.ravel(), (a * mine[:, None]).ravel(), problem.rows)
        reduced = cost + (a * lam[rows]).sum(1)
        cap = np.broadcast_to(part.cap.numpy(), (part.blocks,))
        weight = np.ones(part.variables) if part.weight is None else part.weight.numpy().astype(np.float64)
        upper = np.full(part.variables, np.inf)
        if part.upper is not None:
            upper = np.broadcast_to(part.upper.numpy().astype(np.float64), (part.variables,))
        least += capped_least(reduced, starts, cap, upper, weight, part.equality)
        most -= capped_least(-cost, starts, cap, upper, weight, part.equality)
        worst = max(worst, capped_excess(mine, starts, cap, upper, weight, part.equality))
    return {
        "objective": objective,
        "load": load,
        "lower_bound": least - float(lam @ problem.budgets.numpy()),
        "block_violation": worst,
        "greatest": most,
    }


def capped_excess(
    x: Array, starts: NDArray[np.int64], cap: Array, upper: Array, weight: Array, equality: bool
) -> float:
    """By how much a point leaves its capped boxes.

    Args:
        x: The point, shape (variables,).
        starts: Bounds of the blocks, from 0, shape (blocks + 1,).
        cap: Right-hand sides, shape (blocks,).
        upper: Upper bounds, shape (variables,).
        weight: Weights, shape (variables,).
        equality: Whether the cuts are equations.

    Returns:
        Greatest excess over a bound, or over a cut relative to max(1, cap).
    """
    block = np.repeat(np.arange(cap.size), np.diff(starts))
    used = np.bincount(block, weight * x, cap.size)
    over = np.abs(used - cap) * (np.diff(starts) > 0) if equality else used - cap
    over = over / np.maximum(1.0, np.where(np.isfinite(cap), cap, 1.0))
    return max(float(part.max(initial=0.0)) for part in (-x, x - upper, over))


def capped_least(r: Array, starts: NDArray[np.int64], cap: Array, upper: Array, weight: Array, equality: bool) -> float:
    """Sum over the blocks of the least r'v: items by rising r / w until the cap is used up.

    Args:
        r: Reduced costs, shape (variables,).
        starts: Bounds of the blocks, from 0, shape (blocks + 1,).
        cap: Right-hand sides, shape (blocks,).
        upper: Upper bounds, shape (variables,).
        weight: Weights, shape (variables,).
        equality: Whether the cuts are equations.

    Returns:
        The sum.
    """
    block = np.repeat(np.arange(cap.size), np.diff(starts))
    w, u = weight, np.minimum(upper, cap[block] / weight)
    order = np.lexsort((r / w, block))
    take = (w * u)[order]
    if not equality:
        take = np.where(r[order] < 0, take, 0.0)
    before = np.cumsum(take) - take
    base = np.append(before, before[-1] + take[-1] if take.size else 0.0)[starts[:-1]]
    left = np.maximum(cap[block[order]] - (before - base[block[order]]), 0.0)
    return float(((r / w)[order] * np.minimum(take, left)).sum())
