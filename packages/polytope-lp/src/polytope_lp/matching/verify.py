r"""Independent recomputation of a solution's claims: numpy, float64, separate formulas, none of the solver's kernels.

For every run of blocks it checks $x_i \in C_i$, sums $A x$ and $c'x$ from the exported primal, and sums
$\min_{v \in C_i, v \le t} (c_i + A_i'\lambda)'v$ by filling the fractional knapsack, where $t_e = b_j / a_{je}$ bounds
an edge in rows whose coefficients and budget are at least 0; then $\text{lower} = \sum_i \min - \lambda'b$ with
$\lambda \ge 0$ on inequality rows. Every field of a certificate is compared with what was recomputed, or refused.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from polytope_lp.matching.problem import MatchingProblem

Array = NDArray[np.float64]
Amounts = Callable[[int, int], Array]
"""The primal of a run of blocks, from its first block to the one after its last."""

FIGURES = ("objective", "lower_bound", "max_violation", "tol", "unit", "gamma", "seconds")
BOUNDED = ("upper_bound", "gap")
COUNTS = ("evaluations", "sources", "skipped_sources", "edges", "destinations")
STATUSES = ("optimal", "optimal_residual", "infeasible", "time_limit", "evaluation_limit", "stalled")
ENGINES = ("dual", "highs")
SHRUNK, HELD = 1e-12, 1e-9
"""What a feasible primal may exceed a row by: after shrinking, over the budget; else over the unit of the row."""
PIECE = 1 << 16
"""Variables of a run of blocks: its arrays are all the memory that is taken."""
SLACK = 1e-9
"""What two orders of summation may differ by, relative to the unit of the gap."""


def check_claims(problem: "MatchingProblem", x: Array | Amounts, lam: Array, claims: dict[str, Any]) -> dict[str, Any]:
    """Recompute bounds and feasibility and compare them with a certificate.

    Args:
        problem: The whole problem.
        x: The primal, shape (variables,), float64; or what gives that of the blocks from one to another.
        lam: The prices, shape (rows,), float64.
        claims: What `Solution.certificate` gives.

    Returns:
        `ok`, the recomputed figures, and `problems`: one line for every claim that does not hold.
    """
    failures = malformed(claims)
    found = recompute(problem, x, lam, greatest=claims.get("status") == "infeasible")
    b, free = problem.budgets.numpy(), problem.equality.numpy()
    excess = np.where(free, np.abs(found["load"] - b), found["load"] - b) / found["row_unit"]
    violation = max(float(excess.max(initial=0.0)), 0.0)
    size = max(abs(found["lower_bound"]), found["unit"]) or 1.0
    result = {
        "objective": found["objective"],
        "lower_bound": found["lower_bound"],
        "gap": (found["objective"] - found["lower_bound"]) / size,
        "max_violation": violation,
        "block_violation": found["block_violation"],
    }
    if not failures:
        failures = _false_claims(problem, found, violation, size, lam, claims)
    if claims.get("upper_bound") is None:
        result["gap"] = None
    return {"ok": not failures, "problems": failures, **result}


def malformed(claims: dict[str, Any]) -> list[str]:
    """What a certificate lacks, has too much, or holds in the wrong type.

    Args:
        claims: The certificate.

    Returns:
        One line for every field that cannot be read.
    """
    known = {"status", "proximal", "engine", *FIGURES, *BOUNDED, *COUNTS}
    lines = [f"{name}: no field of a certificate" for name in sorted(set(claims) - known)]
    lines.extend(f"{name}: missing" for name in sorted(known - set(claims)))
    for name in (*FIGURES, *BOUNDED):
        value = claims.get(name, 0.0)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number and not (value is None and name in BOUNDED):
            lines.append(f"{name}: expected a finite number, got {value!r}")
    for name in COUNTS:
        value = claims.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            lines.append(f"{name}: expected a whole number of at least 0, got {value!r}")
    if claims.get("status", "stalled") not in STATUSES:
        lines.append(f"status: expected one of {', '.join(STATUSES)}, got {claims['status']!r}")
    if claims.get("engine", "dual") not in ENGINES:
        lines.append(f"engine: expected one of {', '.join(ENGINES)}, got {claims['engine']!r}")
    if not isinstance(claims.get("proximal", False), bool):
        lines.append(f"proximal: expected true or false, got {claims['proximal']!r}")
    if (claims.get("gap") is None) != (claims.get("upper_bound") is None):
        lines.append("gap, upper_bound: expected both or neither")
    return lines


def _false_claims(
    problem: "MatchingProblem", found: dict[str, Any], violation: float, size: float, lam: Array, claims: dict[str, Any]
) -> list[str]:
    b, free, slack = problem.budgets.numpy(), problem.equality.numpy(), SLACK * size
    objective, lower = found["objective"], found["lower_bound"]
    failures = []

    def require(holds: bool, line: str) -> None:
        if not holds:
            failures.append(line)

    def same(name: str, value: float, tolerance: float = 0.0) -> None:
        require(abs(claims[name] - value) <= tolerance, f"{name}: {claims[name]!r} is claimed, it is {value!r}")

    same("sources", problem.data.blocks)
    same("skipped_sources", problem.skipped)
    same("edges", problem.data.variables)
    same("destinations", problem.rows)
    same("unit", found["unit"], SLACK * found["unit"])
    same("objective", objective, slack)
    require(0.0 < claims["tol"] < 1.0, f"tol: expected a number between 0 and 1, got {claims['tol']!r}")
    require(claims["gamma"] > 0.0, f"gamma: expected a number above 0, got {claims['gamma']!r}")
    require(claims["seconds"] >= 0.0, f"seconds: expected a number of at least 0, got {claims['seconds']!r}")
    require(claims["evaluations"] >= 1, "evaluations: expected at least one")
    block = found["block_violation"]
    require(block <= SLACK, f"a block leaves its polytope by {block:.3e}")
    require(bool((lam[~free] >= 0).all()), "a price of an inequality is negative")
    require(
        lower >= claims["lower_bound"] - slack,
        f"the lower bound is {lower!r}, below the {claims['lower_bound']!r} claimed",
    )
    same("max_violation", violation, SLACK * max(1.0, violation))
    status, tol = claims["status"], claims["tol"]
    residual = abs(objective - claims["lower_bound"]) / size
    if claims["upper_bound"] is not None:
        over, most = violation, HELD
        if found["shrinks"]:
            over, most = float(((found["load"] - b) / np.where(b > 0, b, 1.0)).max(initial=0.0)), SHRUNK
        require(over <= most, f"the primal is not feasible: a row is exceeded by {over:.3e}")
        same("upper_bound", objective, slack)
        claimed = max(abs(claims["lower_bound"]), claims["unit"]) or 1.0
        same("gap", (claims["upper_bound"] - claims["lower_bound"]) / claimed, SLACK)
        require(objective >= lower - slack, f"the objective is below the lower bound by {lower - objective:.3e}")
        require(
            status != "optimal" or -SLACK <= claims["gap"] <= tol, f"optimal: the gap {claims['gap']:.3e} is not in tol"
        )
    require(status != "optimal" or claims["upper_bound"] is not None, "optimal: expected an upper bound, got none")
    require(
        status != "optimal_residual" or (violation <= tol + SLACK and residual <= tol + SLACK),
        f"optimal_residual: violation {violation:.3e} and residual gap {residual:.3e} are not within {tol:.3e}",
    )
    require(
        status != "infeasible" or lower > found["greatest"],
        f"infeasible: the lower bound {lower!r} is not above {found['greatest']!r}, the most of c'x",
    )
    return failures


def implied_rows(problem: "MatchingProblem") -> tuple[NDArray[np.bool_], bool]:
    """Rows that bound the amounts of their edges: all coefficients and the budget at least 0.

    Args:
        problem: The problem.

    Returns:
        Shape (rows,), bool; and whether no coefficient is negative.
    """
    bounding, signs = problem.budgets.numpy() >= 0, True
    if problem.data.coefficient is not None:
        for begin, end in problem.pieces(PIECE):
            part = problem.slice(begin, end)
            a = part.coefficient.numpy()  # type: ignore[union-attr]
            if a.min(initial=0.0) < 0:
                bounding[part.index.numpy()[a < 0]] = False
                signs = False
    return bounding, signs


def recompute(problem: "MatchingProblem", x: Array | Amounts, lam: Array, *, greatest: bool = True) -> dict[str, Any]:
    """Objective, load, lower bound and block violation, run of blocks by run of blocks.

    Args:
        problem: The problem.
        x: The primal, shape (variables,), float64; or what gives that of a run of blocks.
        lam: The prices, shape (rows,), float64.
        greatest: Whether the most that c'x can be in the blocks is wanted.

    Returns:
        `objective`, `load`, `lower_bound`, `block_violation`, `greatest` (0 where it is not wanted),
        `unit` (the most that one edge can add), `shrinks` (whether shrinking repairs) and `row_unit` (what violations
        are relative to).
    """
    b, equality = problem.budgets.numpy(), problem.data.equality
    bounding, signs = implied_rows(problem)
    shrinks = signs and not equality and bool((b >= 0).all()) and not bool(problem.equality.any())
    load, largest, sums, unit, worst = np.zeros(problem.rows), np.abs(b), [0.0, 0.0, 0.0], 0.0, 0.0
    origin = int(problem.data.offsets[0])
    for begin, end in problem.pieces(PIECE):
        part = problem.slice(begin, end)
        starts = (part.offsets - part.offsets[0]).numpy()
        at = slice(int(part.offsets[0]) - origin, int(part.offsets[-1]) - origin)
        mine = x(begin, end) if callable(x) else x[at]
        cost = part.cost.numpy().astype(np.float64)
        rows = part.index.numpy().reshape(part.variables, -1)
        a = np.ones(rows.shape) if part.coefficient is None else part.coefficient.numpy().reshape(rows.shape)
        a = a.astype(np.float64)
        cap = np.broadcast_to(part.cap.numpy(), (part.blocks,))
        weight = np.ones(part.variables) if part.weight is None else part.weight.numpy().astype(np.float64)
        upper = np.full(part.variables, np.inf)
        if part.upper is not None:
            upper = np.broadcast_to(part.upper.numpy().astype(np.float64), (part.variables,))
        inside = bounding[rows] & (a > 0)
        room = np.where(inside, b[rows] / np.where(inside, a, 1.0), np.inf).min(1, initial=np.inf)
        limit = np.minimum(np.minimum(upper, _by_variable(cap, starts) / weight), room)
        pays = np.maximum(-cost, 0.0) if shrinks else np.abs(cost)
        unit = max(unit, float((pays * limit).max(initial=0.0)))
        if not shrinks:
            np.maximum.at(largest, rows, np.abs(a) * limit[:, None])
        sums[0] += float(cost @ mine)
        load += np.bincount(rows.ravel(), (a * mine[:, None]).ravel(), problem.rows)
        tight = _fillable(np.minimum(upper, room), upper, starts, cap, weight) if equality else np.minimum(upper, room)
        sums[1] += capped_least(cost + (a * lam[rows]).sum(1), starts, cap, tight, weight, equality)
        if greatest:
            sums[2] -= capped_least(-cost, starts, cap, tight, weight, equality)
        worst = max(worst, capped_excess(mine, starts, cap, upper, weight, equality))
    return {
        "objective": sums[0],
        "load": load,
        "lower_bound": sums[1] - float(lam @ b),
        "block_violation": worst,
        "greatest": sums[2],
        "unit": unit,
        "shrinks": shrinks,
        "row_unit": np.where(largest > 0, largest, 1.0),
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
        Greatest excess over a bound relative to the bound, or over a cut relative to the cap; below zero, absolute.
    """
    used, filled = np.zeros(cap.size), np.flatnonzero(np.diff(starts) > 0)
    used[filled] = np.add.reduceat(weight * x, starts[filled]) if filled.size else 0.0
    over = np.abs(used - cap) * (np.diff(starts) > 0) if equality else used - cap
    over = np.where(over > 0, over / np.where(np.isfinite(cap) & (cap > 0), cap, 1.0), 0.0)
    bound = np.where(np.isfinite(upper), upper, x)  # no bound is above any amount
    above = (x - bound) / np.where(bound > 0, bound, 1.0)
    return max(float(part.max(initial=0.0)) for part in (-x, above, over))


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
    caps, w = _by_variable(cap, starts), weight
    u = np.minimum(upper, caps / w)
    if not equality and not np.isfinite(cap).any():
        return float((np.minimum(r, 0.0) * u).sum())  # boxes
    # A block whose best item alone uses up the cap takes nothing else; one without an item that pays takes nothing.
    filled = np.flatnonzero(np.diff(starts) > 0)
    q, least, done = r / w, np.zeros(cap.size), np.ones(cap.size, dtype=bool)
    least[filled] = np.minimum.reduceat(q, starts[filled]) if filled.size else 0.0
    enough = (q == _by_variable(least, starts)) & (upper >= caps / w)
    done[filled] = np.logical_or.reduceat(enough, starts[filled]) if filled.size else True
    if not equality:
        least = np.minimum(least, 0.0)
        done |= least == 0.0
    done &= np.isfinite(cap)
    total = float((least * np.where(done, cap, 0.0))[done].sum())
    rest = _by_variable(~done, starts)
    if not rest.any():
        return total
    lengths = np.diff(starts)[~done]
    block, cap = np.repeat(np.arange(lengths.size), lengths), cap[~done]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    r, w, u = r[rest], w[rest], u[rest]
    order = np.lexsort((r / w, block))
    take = (w * u)[order]
    if not equality:
        take = np.where(r[order] < 0, take, 0.0)
    # What is taken before an item within its block: sums of one block must not lose digits to those of others.
    before = _running(take, starts) - take
    left = np.maximum(cap[block[order]] - before, 0.0)
    return total + float(((r / w)[order] * np.minimum(take, left)).sum())


def _by_variable(values: NDArray[Any], starts: NDArray[np.int64]) -> NDArray[Any]:
    # What belongs to the blocks, for each of their variables; one value for all is not spread out.
    if values.strides == (0,):
        return np.broadcast_to(values[:1], (int(starts[-1]),)) if values.size else values
    return np.repeat(values, np.diff(starts))


def _fillable(tight: Array, upper: Array, starts: NDArray[np.int64], cap: Array, weight: Array) -> Array:
    # Bounds of blocks that must reach their cap: the rows' own only where they leave room for it.
    block = np.repeat(np.arange(cap.size), np.diff(starts))
    reach = np.bincount(block, weight * np.minimum(tight, cap[block] / weight), cap.size)
    return np.where((reach >= cap)[block], tight, upper)


def _running(take: Array, starts: NDArray[np.int64]) -> Array:
    # Running sums that begin anew in every block: by position within the block, all blocks at once.
    lengths = np.diff(starts)
    total = take.copy()
    live, place = np.flatnonzero(lengths > 1), 1
    while live.size:
        at = starts[live] + place
        total[at] += total[at - 1]
        place += 1
        live = live[lengths[live] > place]
    return total
