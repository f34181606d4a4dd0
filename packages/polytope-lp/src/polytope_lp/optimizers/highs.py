"""HiGHS, as scipy ships it: a primal and dual pair of a plain LP, and rays where there is none.

What it returns is never claimed as it is: callers recompute bounds and violations from its points.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.optimize import linprog

Array = NDArray[np.float64]
TOLERANCE = 1e-9
"""Feasibility that is asked for; HiGHS takes 1e-10 at least."""
USUAL = (1e-3, 1e3)
"""Median sizes of costs that HiGHS's absolute tolerance suits; others are brought near one by a power of two."""
ENTRIES = (1e-6, 1e6)
"""Sizes of coefficients that HiGHS takes as they are: it drops those below 1e-9, and its tolerances are absolute."""
SWEEPS = 10
"""Sweeps over rows and columns, which settle their geometric means."""
_STATUS = {0: "optimal", 1: "time_limit", 2: "infeasible", 3: "unbounded"}


@dataclass(frozen=True)
class Point:
    """What HiGHS found.

    Attributes:
        status: `optimal`, `time_limit`, `infeasible`, `unbounded` or `stalled`.
        x: Primal, shape (n,); zeros if there is none.
        lam: Multipliers, inequalities first, shape (m,); zeros if there are none.
        iterations: Simplex iterations.
        ray: Of an infeasible LP multipliers that prove it, shape (m,); of an unbounded one a direction, shape (n,).
    """

    status: str
    x: Array
    lam: Array
    iterations: int
    ray: Array | None = None


def solve_rows(
    c: Array,
    A: scipy.sparse.csr_array,
    b: Array,
    inequalities: int,
    lower: Array,
    upper: Array,
    time_limit: float | None = None,
) -> Point:
    """Solve an LP over bounds.

    Args:
        c: Costs, shape (n,).
        A: Rows, inequalities (`<=`) first, shape (m, n).
        b: Right-hand sides, shape (m,).
        inequalities: Number of inequalities.
        lower: Lower bounds, shape (n,).
        upper: Upper bounds, shape (n,).
        time_limit: Seconds, or None.

    Returns:
        The point.
    """
    scales = _equilibration(A)
    if scales is None:
        return _solved(c, A, b, inequalities, lower, upper, time_limit)
    row, column = scales
    scaled = scipy.sparse.csr_array(scipy.sparse.diags_array(row) @ A @ scipy.sparse.diags_array(column))
    found = _solved(column * c, scaled, row * b, inequalities, lower / column, upper / column, time_limit)
    ray = None if found.ray is None else found.ray * (row if found.status == "infeasible" else column)
    return replace(found, x=np.clip(column * found.x, lower, upper), lam=row * found.lam, ray=ray)


def _equilibration(A: scipy.sparse.csr_array) -> tuple[Array, Array] | None:
    # Powers of two by row and column that bring entries near one where some are far from it; None where none are.
    entries = scipy.sparse.coo_array(A)
    at = entries.data != 0
    (i, j), size = (axis[at] for axis in entries.coords), np.abs(entries.data[at])
    if not size.size or (size.min() >= ENTRIES[0] and size.max() <= ENTRIES[1]):
        return None
    logs, (m, n) = np.log2(size), A.shape
    row, column = np.zeros(m), np.zeros(n)
    in_row, in_column = (np.maximum(np.bincount(at, minlength=k), 1) for at, k in ((i, m), (j, n)))
    for _ in range(SWEEPS):
        row = -np.bincount(i, logs + column[j], m) / in_row
        column = -np.bincount(j, logs + row[i], n) / in_column
    return np.exp2(np.round(row)), np.exp2(np.round(column))


def _solved(
    c: Array,
    A: scipy.sparse.csr_array,
    b: Array,
    inequalities: int,
    lower: Array,
    upper: Array,
    time_limit: float | None,
) -> Point:
    """The point of an LP whose coefficients are of usual sizes."""
    unit = _unit(c)
    found = _linprog(c / unit, A, b, inequalities, lower, upper, time_limit)
    status = _STATUS.get(found.status, "stalled")
    if status != "optimal" and found.x is None:
        ray = None
        if status == "infeasible":
            ray = _infeasible(A, b, inequalities, lower, upper, time_limit)
        elif status == "unbounded":
            inner = _linprog(np.zeros_like(c), A, b, inequalities, lower, upper, time_limit)
            ray = _unbounded(c / unit, A, inequalities, lower, upper, time_limit)
            if inner.x is None or ray is None:
                return Point("stalled", np.zeros(c.size), np.zeros(b.size), int(found.nit))
            return Point(status, np.asarray(inner.x), np.zeros(b.size), int(found.nit), ray)
        return Point(status, np.clip(np.zeros(c.size), lower, upper), np.zeros(b.size), int(found.nit), ray)
    lam = -unit * np.concatenate([found.ineqlin.marginals, found.eqlin.marginals])
    return Point(status, np.clip(np.asarray(found.x), lower, upper), lam, int(found.nit))


def _unit(c: Array) -> float:
    # A power of two near the median size of the costs, where that is an unusual one.
    sizes = np.abs(c[c != 0])
    median = float(np.median(sizes)) if sizes.size else 1.0
    return 1.0 if USUAL[0] <= median <= USUAL[1] else float(np.exp2(np.round(np.log2(median))))


def _linprog(c: Array, A: Any, b: Array, k: int, lower: Array, upper: Array, time_limit: float | None = None) -> Any:
    options: dict[str, Any] = {"primal_feasibility_tolerance": TOLERANCE, "dual_feasibility_tolerance": TOLERANCE}
    if time_limit is not None:
        options["time_limit"] = time_limit
    ub, eq = (A[:k], b[:k]) if k else (None, None), (A[k:], b[k:]) if k < b.size else (None, None)
    bounds = np.stack([lower, upper], 1)
    run: Any = linprog  # its stubs know no union of absent and sparse rows
    return run(c, ub[0], ub[1], eq[0], eq[1], bounds, method="highs", options=options)


def _infeasible(A: Any, b: Array, k: int, lower: Array, upper: Array, time_limit: float | None) -> Array | None:
    # Least sum of violations: where it is above zero, its multipliers are the proof.
    m, n = A.shape
    slack = scipy.sparse.csr_array(
        scipy.sparse.hstack([-scipy.sparse.eye_array(m), scipy.sparse.eye_array(m).tocsc()[:, k:]])
    )
    c = np.concatenate([np.zeros(n), np.ones(2 * m - k)])
    wide = scipy.sparse.csr_array(scipy.sparse.hstack([A, slack]))
    low, high = np.concatenate([lower, np.zeros(2 * m - k)]), np.concatenate([upper, np.full(2 * m - k, np.inf)])
    found = _linprog(c, wide, b, k, low, high, time_limit)
    if found.x is None:
        return None
    return -np.concatenate([found.ineqlin.marginals, found.eqlin.marginals])


def _unbounded(c: Array, A: Any, k: int, lower: Array, upper: Array, time_limit: float | None) -> Array | None:
    # A direction of the recession cone in which the objective falls.
    down, up = np.where(np.isinf(lower), -1.0, 0.0), np.where(np.isinf(upper), 1.0, 0.0)
    found = _linprog(c, A, np.zeros(A.shape[0]), k, down, up, time_limit)
    return np.asarray(found.x) if found.x is not None and found.fun < 0 else None
