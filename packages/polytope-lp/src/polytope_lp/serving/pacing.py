"""Budget pacing: what live traffic has spent, against what the plan had spent by now."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from core_tensor.checks import check_number
from numpy.typing import ArrayLike, NDArray

AHEAD = 1.1
"""Pace above which a budget is `ahead`, and below whose inverse it is `behind`."""


def pacing_report(plan: pa.Table, spent: ArrayLike, elapsed: float) -> pa.Table:
    r"""Compare what has been spent with the plan.

    Args:
        plan: What `Solution.prices` gives: destination (and resource), budget, load and price by row.
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
    check_number("elapsed", elapsed, low=0.0, high=1.0, open_low=True)
    now = np.asarray(spent, dtype=np.float64).reshape(-1)
    if now.shape[0] != plan.num_rows or not (np.isfinite(now) & (now >= 0)).all():
        raise ValueError(f"spent: expected {plan.num_rows} finite values of at least 0, got shape {now.shape}")
    budget, planned = (np.asarray(plan.column(name), dtype=np.float64) for name in ("budget", "load"))
    expected, projected = planned * elapsed, now / elapsed
    with np.errstate(divide="ignore", invalid="ignore"):
        pace = np.where(expected > 0, now / expected, np.where(now > 0, np.inf, 1.0))
    states = ["exhausted", "over", "ahead", "behind"]
    spent_up, beyond = (now >= budget) & (budget > 0), projected > budget * (1 + 1e-9)
    state = np.select([spent_up, beyond, pace > AHEAD, pace < 1 / AHEAD], states, "on plan")
    return pa.table(
        {
            **{name: plan.column(name) for name in ("destination", "resource") if name in plan.column_names},
            "budget": budget,
            "planned": planned,
            "expected": expected,
            "spent": now,
            "pace": pace,
            "projected": projected,
            "price": plan.column("price"),
            "state": state.tolist(),
        }
    )


def spent_by_row(table: pa.Table, plan: pa.Table) -> NDArray[np.float64]:
    """Bring a table of what was spent into the order of a plan; what it does not name has spent nothing.

    Args:
        table: Columns destination, spent, and resource where every destination has several budgets.
        plan: What `Solution.prices` gives.

    Returns:
        Shape (rows of the plan,), float64.

    Raises:
        ValueError: If a column is missing, or a destination or resource unknown.
    """
    by = [name for name in ("destination", "resource") if name in plan.column_names]
    for title, names, one in (("plan", by, plan), ("spent", [*by, "spent"], table)):
        wrong = [name for name in names if one.column_names.count(name) != 1]
        if wrong:
            raise ValueError(f"{title}: expected one column {wrong[0]!r}, got {', '.join(one.column_names)}")
    place, size = np.zeros(table.num_rows, dtype=np.int64), 1
    row = np.zeros(plan.num_rows, dtype=np.int64)
    for name in by:  # a row of the plan is named by one key of each kind
        keys = pc.unique(plan.column(name))
        try:
            asked = pc.index_in(table.column(name).cast(keys.type), keys)
        except pa.ArrowException as error:
            raise ValueError(f"spent.{name}: {table.column(name).type} does not fit {keys.type}") from error
        if asked.null_count:
            unknown = table.column(name).filter(pc.is_null(asked))[0].as_py()
            raise ValueError(f"spent.{name}: {unknown!r} is without a budget in the plan")
        place = place * len(keys) + np.asarray(asked, dtype=np.int64)
        row = row * len(keys) + np.asarray(pc.index_in(plan.column(name), keys), dtype=np.int64)
        size *= len(keys)
    try:
        spent = np.asarray(table.column("spent").cast(pa.float64()), dtype=np.float64)
    except pa.ArrowException as error:
        raise ValueError(f"spent.spent: expected numbers, got {table.column('spent').type}") from error
    return np.asarray(np.bincount(place, spent, size)[row], dtype=np.float64)
