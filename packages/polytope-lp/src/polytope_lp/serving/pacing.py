"""Budget pacing: what live traffic has spent, against what the plan had spent by now."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from core_tensor.checks import check_number
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from polytope_lp.matching.solution import Solution

AHEAD = 1.1
"""Pace above which a budget is `ahead`, and below whose inverse it is `behind`."""


def pacing_report(solution: "Solution", spent: ArrayLike, elapsed: float) -> pa.Table:
    r"""Compare what has been spent with the plan.

    Args:
        solution: The plan.
        spent: What every budget has spent so far, shape (rows,).
        elapsed: Part of the period that has passed, in (0, 1].

    Returns:
        Columns destination (and resource), budget, planned (load of the whole period), expected (planned * elapsed),
        spent, pace (spent / expected), projected (spent / elapsed, the whole period's at this rate), price, and state:
        `exhausted` (the budget is spent), `over` (projected beyond the budget), `ahead` or `behind` (pace off by more
        than 10 %), or `on plan`.

    Raises:
        ValueError: If `spent` has another length, is negative or not finite, or `elapsed` is outside (0, 1].
    """
    from polytope_lp.matching.solution import row_columns

    check_number("elapsed", elapsed, low=0.0, high=1.0, open_low=True)
    now = np.asarray(spent, dtype=np.float64).reshape(-1)
    problem = solution.problem
    if now.shape[0] != problem.rows or not (np.isfinite(now) & (now >= 0)).all():
        raise ValueError(f"spent: expected {problem.rows} finite values of at least 0, got shape {now.shape}")
    budget, planned = problem.budgets.numpy(), solution.load.numpy()
    expected, projected = planned * elapsed, now / elapsed
    with np.errstate(divide="ignore", invalid="ignore"):
        pace = np.where(expected > 0, now / expected, np.where(now > 0, np.inf, 1.0))
    states = ["exhausted", "over", "ahead", "behind"]
    spent_up, beyond = (now >= budget) & (budget > 0), projected > budget * (1 + 1e-9)
    state = np.select([spent_up, beyond, pace > AHEAD, pace < 1 / AHEAD], states, "on plan")
    return pa.table(
        {
            **row_columns(problem),
            "budget": budget,
            "planned": planned,
            "expected": expected,
            "spent": now,
            "pace": pace,
            "projected": projected,
            "price": solution.lam.numpy(),
            "state": state.tolist(),
        }
    )


def spent_by_row(table: pa.Table, problem: Any) -> NDArray[np.float64]:
    """Bring a table of what was spent into the order of the rows; what it does not name has spent nothing.

    Args:
        table: Columns destination, spent, and resource where every destination has several budgets.
        problem: The problem.

    Returns:
        Shape (rows,), float64.

    Raises:
        ValueError: If a column is missing, or a destination or resource unknown.
    """
    needed = ["destination", "spent", *(["resource"] if problem.resources else [])]
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise ValueError(f"spent: expected a column {missing[0]!r}, got {', '.join(table.column_names)}")
    keys = problem.destination_keys
    column = table.column("destination")
    if keys is None:
        row = np.asarray(column, dtype=np.int64)
    else:
        row = np.asarray(pc.index_in(column.cast(keys.type), keys).fill_null(-1), dtype=np.int64)
    if row.size and not 0 <= row.min() <= row.max() < problem.destinations:
        raise ValueError("spent.destination: names one without a budget")
    if problem.resources:
        number = {name: k for k, name in enumerate(problem.resources)}
        names = table.column("resource").to_pylist()
        unknown = [name for name in names if name not in number]
        if unknown:
            raise ValueError(f"spent.resource: expected one of {', '.join(number)}, got {unknown[0]!r}")
        row = row + problem.destinations * np.array([number[name] for name in names], dtype=np.int64)
    spent = np.asarray(table.column("spent"), dtype=np.float64)
    return np.asarray(np.bincount(row, spent, problem.rows), dtype=np.float64)
