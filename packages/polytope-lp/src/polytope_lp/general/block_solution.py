r"""Solving a `BlockLP`: what comes back, and `linprog_blocks` in scipy's shape."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from core_tensor.checks import check_number
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeResult

from polytope_lp.general.block_lp import BlockLP, equilibrated
from polytope_lp.general.newton import Exact, solve_exact
from polytope_lp.matching.options import SMALLEST_TOL
from polytope_lp.polytopes import Polytope

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BlockSolution:
    r"""A primal and dual pair of a `BlockLP`, with what certifies it.

    Attributes:
        status: `optimal` (a feasible primal and a lower bound whose gap is within tol), `optimal_residual` (shrinking
            cannot repair the primal; violation, dual residual and gap are within tol), `infeasible` (`ray` proves it),
            `time_limit`, or `stalled` (no further progress; nothing is claimed).
        x: Primal, shape (n,).
        lam: Multipliers, inequalities first, shape (m,).
        objective: $c'x$.
        lower_bound: Certified lower bound; -inf where unbounded variables allow none.
        upper_bound: Cost of the feasible primal; inf if shrinking cannot repair one.
        gap: (upper - lower) / max(1, |lower|) where both are finite, else $|\lambda'(Ax - b)|$ over max(1, |c'x|).
        max_violation: Greatest violation of a row over 1 + |b| + |A| |x|, the size of what is summed.
        dual_residual: ||x - Proj(x - c - A'lam)|| / (1 + ||c||) of the scaled LP.
        iterations: Proximal steps.
        newton: Newton steps.
        seconds: Wall time of the run.
        history: One entry per proximal step.
        ray: Multipliers that prove infeasibility, shape (m,), or None.
        problem: The LP.
    """

    status: str
    x: Array
    lam: Array
    objective: float
    lower_bound: float
    upper_bound: float
    gap: float
    max_violation: float
    dual_residual: float
    iterations: int
    newton: int
    seconds: float
    history: list[dict[str, Any]] = field(repr=False)
    ray: Array | None = field(repr=False)
    problem: BlockLP = field(repr=False)

    def primal(self) -> pa.RecordBatchReader:
        """The nonzeros of the primal as a stream of Arrow batches.

        Returns:
            A reader of columns block, variable and x.
        """
        schema = pa.schema([("block", pa.int64()), ("variable", pa.int64()), ("x", pa.float64())])

        def batches() -> Iterator[pa.RecordBatch]:
            first = 0
            for at, group in self.problem.pieces():
                nonzero = np.flatnonzero(self.x[at])
                block = np.searchsorted(group.offsets, nonzero, side="right") - 1 + first
                yield pa.record_batch([block, nonzero + at.start, self.x[at][nonzero]], schema=schema)
                first += group.offsets.size - 1

        return pa.RecordBatchReader.from_batches(schema, batches())

    def certificate(self) -> dict[str, Any]:
        """The claims of this solution as JSON; infinities stand as null.

        Returns:
            Status, bounds, gap and residuals.
        """
        names = ("objective", "lower_bound", "upper_bound", "gap", "max_violation", "dual_residual", "seconds")
        figures = {name: getattr(self, name) if np.isfinite(getattr(self, name)) else None for name in names}
        return {"status": self.status, **figures, "iterations": self.iterations, "newton": self.newton}

    def verify(self) -> dict[str, Any]:
        """Recompute every claim by other code: blocks by linear programs over their vertices, bounds by the oracles.

        Returns:
            See `polytope_lp.general.verify_blocks.verify_blocks`.
        """
        from polytope_lp.general.verify_blocks import verify_blocks

        return verify_blocks(self)


def solve_blocks(
    lp: BlockLP,
    tol: float = 1e-7,
    time_limit: float | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> BlockSolution:
    """Solve an LP over blocks exactly: proximal method of multipliers with semismooth Newton steps.

    Args:
        lp: The LP.
        tol: Violation, dual residual and gap to reach.
        time_limit: Seconds after which the best point so far is returned.
        report: Called with every entry of the history.

    Returns:
        The solution; read `status` before using it.
    """
    check_number("tol", tol, low=SMALLEST_TOL, high=1.0, open_high=True)
    if time_limit is not None:
        check_number("time_limit", time_limit, low=0.0, open_low=True)
    started, n = time.monotonic(), lp.c.size
    scaled, rows, columns, (unit_c, unit_x) = equilibrated(lp)
    history: list[dict[str, Any]] = []

    def late() -> bool:
        return time_limit is not None and time.monotonic() - started > time_limit

    def own(found: Exact) -> dict[str, Any]:
        x = lp.project(found.x[:n] * columns[:n] * unit_x)
        return _claims(lp, x, lp.signed(found.lam * rows * unit_c), found.dual)

    def accept(found: Exact) -> bool:
        claims = own(found)
        return bool(max(claims["max_violation"], claims["dual_residual"], claims["gap"]) <= tol)

    def note(found: Exact) -> None:
        seconds = round(time.monotonic() - started, 6)
        entry = {"iteration": found.outer, "seconds": seconds, "violation": found.primal, "dual": found.dual}
        history.append(entry | {"newton": found.newton, "gap": None})
        if report:
            report(history[-1])

    def infeasible(ray: Array) -> bool:
        return lp.proves_infeasible(ray * rows)

    found = solve_exact(scaled, tol / 100, deadline=late, infeasible=infeasible, accept=accept, report=note)
    claims = own(found)
    good = max(claims["max_violation"], claims["dual_residual"], claims["gap"]) <= tol
    status = "optimal" if good and np.isfinite(claims["upper_bound"]) else "optimal_residual"
    if not good:
        status = "infeasible" if found.ray is not None else "time_limit" if late() else "stalled"
    return BlockSolution(
        status=status,
        **claims,
        iterations=found.outer,
        newton=found.newton,
        seconds=time.monotonic() - started,
        history=history,
        ray=None if good or found.ray is None else lp.signed(found.ray * rows),
        problem=lp,
    )


def _claims(lp: BlockLP, x: Array, lam: Array, dual_residual: float) -> dict[str, Any]:
    upper, lower = np.inf, lp.lower_bound(lam)
    if lp.repairable:
        x = lp.repaired(x)
        upper = float(lp.c @ x)
    objective = float(lp.c @ x)
    gap = abs(float(lam @ (lp.A @ x - lp.b))) / max(1.0, abs(objective))
    if np.isfinite(upper) and np.isfinite(lower):
        gap = (upper - lower) / max(1.0, abs(lower))
    # Relative to what is summed: rows of large entries carry rounding in proportion.
    summed = 1 + np.abs(lp.b) + abs(lp.A) @ np.abs(x)
    return {
        "x": x,
        "lam": lam,
        "objective": objective,
        "lower_bound": lower,
        "upper_bound": upper,
        "gap": gap,
        "max_violation": float((lp.excess(x) / summed).max(initial=0.0)),
        "dual_residual": dual_residual,
    }


CODES = {"optimal": 0, "optimal_residual": 0, "time_limit": 1, "infeasible": 2, "stalled": 4}
MESSAGES = {
    "optimal": "optimal: the primal is feasible and its gap is below tol",
    "optimal_residual": "optimal: violation, dual residual and gap are below tol",
    "time_limit": "time limit reached",
    "infeasible": "infeasible: the multipliers in `ray` prove that no point satisfies the rows",
    "stalled": "accuracy not reached",
}


def linprog_blocks(
    c: ArrayLike,
    A_ub: Any = None,
    b_ub: ArrayLike | None = None,
    A_eq: Any = None,
    b_eq: ArrayLike | None = None,
    bounds: Any = None,
    blocks: Sequence[tuple[Polytope, ArrayLike]] | None = None,
    *,
    tol: float = 1e-7,
    time_limit: float | None = None,
) -> OptimizeResult:
    """Solve an LP over blocks; arguments and result as in `scipy.optimize.linprog`.

    Args:
        c: Costs, shape (n,).
        A_ub: Rows of the inequalities, shape (m_ub, n), dense or sparse.
        b_ub: Their right-hand sides, shape (m_ub,).
        A_eq: Rows of the equations, shape (m_eq, n), dense or sparse.
        b_eq: Their right-hand sides, shape (m_eq,).
        bounds: As in scipy; used where there are no blocks.
        blocks: Polytopes in the order of the variables, each with the lengths of its blocks.
        tol: Violation, dual residual and gap to reach.
        time_limit: Seconds after which the best point so far is returned.

    Returns:
        scipy's `x`, `fun`, `slack`, `con`, `ineqlin` and `eqlin` (`residual`, `marginals`), `nit` (proximal steps),
        `status`, `success` and `message`: 0 optimal, 1 limit reached, 2 infeasible (proved), 4 accuracy not reached.
        Beyond scipy: `lam` (multipliers, inequalities first; the negative marginals), `lower_bound` (certified; -inf if
        there is none), `upper_bound`, `gap`, `violation`, `dual_residual`, `newton`, `ray`.
    """
    lp = BlockLP.build(c, A_ub, b_ub, A_eq, b_eq, bounds, blocks)
    found = solve_blocks(lp, tol, time_limit)
    left, k = lp.b - lp.A @ found.x, lp.inequalities
    code = CODES[found.status]
    return _result(
        x=found.x,
        fun=found.objective,
        slack=left[:k],
        con=left[k:],
        ineqlin=_result(residual=left[:k], marginals=-found.lam[:k]),
        eqlin=_result(residual=left[k:], marginals=-found.lam[k:]),
        nit=found.iterations,
        status=code,
        success=code == 0,
        message=MESSAGES[found.status],
        lam=found.lam,
        lower_bound=found.lower_bound,
        upper_bound=found.upper_bound,
        gap=found.gap,
        violation=found.max_violation,
        dual_residual=found.dual_residual,
        newton=found.newton,
        ray=found.ray,
    )


def _result(**fields: Any) -> OptimizeResult:
    result = OptimizeResult()
    result.update(fields)
    return result
