r"""Solving a `BlockLP`: what comes back, and `linprog_blocks` in scipy's shape."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from core_tensor.checks import check_choice, check_number
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeResult

from polytope_lp.general.block_lp import BlockLP, equilibrated
from polytope_lp.general.newton import Exact, solve_exact
from polytope_lp.general.verify_blocks import verify_blocks
from polytope_lp.matching.options import SMALLEST_TOL
from polytope_lp.optimizers.highs import solve_rows
from polytope_lp.polytopes import Polytope

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BlockSolution:
    r"""A primal and dual pair of a `BlockLP`, with what certifies it.

    Attributes:
        status: `optimal` (a feasible primal and a lower bound whose gap is within tol), `optimal_residual` (shrinking
            cannot repair the primal; violation, dual residual and gap are within tol), `infeasible` (`ray` proves it),
            `unbounded` (x is feasible, and the objective falls for ever along `ray`), `time_limit`, or `stalled` (no
            further progress; nothing is claimed).
        x: Primal, shape (n,).
        lam: Multipliers, inequalities first, shape (m,).
        objective: $c'x$.
        lower_bound: Certified lower bound; -inf where unbounded variables allow none.
        upper_bound: Cost of the feasible primal; inf if shrinking cannot repair one.
        gap: (upper - lower) / |lower| where both are finite, else $|\lambda'(Ax - b)| / |c'x|$; relative to the largest
            term $|c_j x_j|$ where that is more.
        max_violation: Greatest violation of a row over 1 + |b| + |A| |x|, the size of what is summed.
        dual_residual: ||x - Proj(x - c - A'lam)|| / (1 + ||c||) of the scaled LP.
        iterations: Proximal steps; simplex iterations of HiGHS.
        newton: Newton steps.
        engine: What ran: `newton` or `highs`.
        tol: Violation, dual residual and gap that were asked for.
        seconds: Wall time of the run.
        history: One entry per proximal step.
        ray: Of an infeasible LP multipliers that prove it, shape (m,); of an unbounded one a direction, shape (n,).
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
    engine: str
    tol: float
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
        """The claims of this solution as JSON; infinities become null.

        Returns:
            Status, bounds, gap and residuals.
        """
        names = ("objective", "lower_bound", "upper_bound", "gap", "max_violation", "dual_residual", "seconds")
        figures = {name: getattr(self, name) if np.isfinite(getattr(self, name)) else None for name in names}
        counts = {"iterations": self.iterations, "newton": self.newton}
        return {"status": self.status, "engine": self.engine, "tol": self.tol, **figures, **counts}

    def verify(self) -> dict[str, Any]:
        """Recompute every claim by other code: blocks by linear programs over their vertices, bounds by the oracles.

        Returns:
            See `polytope_lp.general.verify_blocks.verify_blocks`.
        """
        return verify_blocks(self.problem, self.x, self.lam, self.ray, self.certificate())


def solve_blocks(
    lp: BlockLP,
    tol: float = 1e-7,
    time_limit: float | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    engine: str = "auto",
) -> BlockSolution:
    """Solve an LP over blocks exactly: proximal method of multipliers with semismooth Newton steps, or HiGHS for boxes.

    Args:
        lp: The LP.
        tol: Violation, dual residual and gap to reach.
        time_limit: Seconds after which the best point so far is returned.
        report: Called with every entry of the history.
        engine: `newton`; `highs`, where every block is a box; `auto` for the second where it can, else the first.

    Returns:
        The solution; read `status` before using it.

    Raises:
        ValueError: If `engine` is `highs` and a block is not a box.
    """
    check_choice("engine", engine, ENGINES)
    check_number("tol", tol, low=SMALLEST_TOL, high=1.0, open_high=True)
    if time_limit is not None:
        check_number("time_limit", time_limit, low=0.0, open_low=True)
    box = None if engine == "newton" else lp.box()
    if engine == "highs" and box is None:
        raise ValueError("engine: expected newton, since a block is not a box, got 'highs'")
    if box is not None:
        return _by_highs(lp, tol, time_limit, report, box)
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
        engine="newton",
        tol=tol,
        seconds=time.monotonic() - started,
        history=history,
        ray=None if good or found.ray is None else lp.signed(found.ray * rows),
        problem=lp,
    )


def _by_highs(
    lp: BlockLP,
    tol: float,
    time_limit: float | None,
    report: Callable[[dict[str, Any]], None] | None,
    box: tuple[Array, Array],
) -> BlockSolution:
    """HiGHS's point, and our claims about it."""
    started = time.monotonic()
    found = solve_rows(lp.c, lp.A, lp.b, lp.inequalities, *box, time_limit)
    scaled, rows, columns, (unit_c, unit_x) = equilibrated(lp)
    lam, status, n = lp.signed(found.lam), found.status, lp.c.size
    slack = (lp.b - lp.A @ found.x)[: lp.inequalities] * rows[: lp.inequalities]
    point = np.concatenate([found.x, slack / columns[n:] if lp.inequalities else slack])
    point[:n] /= columns[:n]
    point = scaled.project(point / unit_x)
    reduced = scaled.c + scaled.A.T @ (lam / (rows * unit_c))
    moved = float(np.linalg.norm(point - scaled.project(point - reduced)))
    claims = _claims(lp, found.x, lam, moved / (1 + float(np.linalg.norm(scaled.c))))
    if status == "optimal":
        good = max(claims["max_violation"], claims["dual_residual"], claims["gap"]) <= tol
        status = "stalled" if not good else "optimal" if np.isfinite(claims["upper_bound"]) else "optimal_residual"
    ray = found.ray
    if status == "infeasible":
        ray = None if ray is None else lp.signed(ray)
        status = "infeasible" if ray is not None and lp.proves_infeasible(ray) else "stalled"
    if status == "unbounded" and (ray is None or claims["max_violation"] > tol):
        status = "stalled"
    if status == "stalled" and time_limit is not None and time.monotonic() - started > time_limit:
        status = "time_limit"
    seconds = round(time.monotonic() - started, 6)
    history = [
        {"iteration": found.iterations, "seconds": seconds, "violation": claims["max_violation"]}
        | {"dual": claims["dual_residual"], "newton": 0, "gap": claims["gap"]}
    ]
    if report:
        report(history[-1])
    return BlockSolution(
        status=status,
        **claims,
        iterations=found.iterations,
        newton=0,
        engine="highs",
        tol=tol,
        seconds=time.monotonic() - started,
        history=history,
        ray=ray,
        problem=lp,
    )


def _claims(lp: BlockLP, x: Array, lam: Array, dual_residual: float) -> dict[str, Any]:
    upper, lower = np.inf, lp.lower_bound(lam)
    if lp.repairable:
        x = lp.repaired(x)
        upper = float(lp.c @ x)
    objective = float(lp.c @ x)
    # Relative to the objective, but no less than to its largest term: a sum may cancel.
    term = float(np.abs(lp.c * x).max(initial=0.0))
    gap = abs(float(lam @ (lp.A @ x - lp.b))) / (max(term, abs(objective)) or 1.0)
    if np.isfinite(upper) and np.isfinite(lower):
        gap = (upper - lower) / (max(term, abs(lower)) or 1.0)
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


ENGINES = ("auto", "newton", "highs")
CODES = {"optimal": 0, "optimal_residual": 0, "time_limit": 1, "infeasible": 2, "unbounded": 3, "stalled": 4}
MESSAGES = {
    "optimal": "optimal: the primal is feasible and its gap is below tol",
    "optimal_residual": "optimal: violation, dual residual and gap are below tol",
    "time_limit": "time limit reached",
    "infeasible": "infeasible: the multipliers in `ray` prove that no point satisfies the rows",
    "unbounded": "unbounded: the objective falls for ever along `ray`",
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
    engine: str = "auto",
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
        engine: `newton`; `highs`, where every block is a box; `auto` for the second where it can, else the first.

    Returns:
        scipy's `x`, `fun`, `slack`, `con`, `ineqlin` and `eqlin` (`residual`, `marginals`), `nit`,
        `status`, `success` and `message`: 0 optimal, 1 limit reached, 2 infeasible (proved), 3 unbounded (proved),
        4 accuracy not reached.
        Beyond scipy: `lam` (multipliers, inequalities first; the negative marginals), `lower_bound` (certified; -inf if
        there is none), `upper_bound`, `gap`, `violation`, `dual_residual`, `newton`, `ray`.
    """
    lp = BlockLP.build(c, A_ub, b_ub, A_eq, b_eq, bounds, blocks)
    found = solve_blocks(lp, tol, time_limit, engine=engine)
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
        engine=found.engine,
        ray=found.ray,
    )


def _result(**fields: Any) -> OptimizeResult:
    result = OptimizeResult()
    result.update(fields)
    return result
