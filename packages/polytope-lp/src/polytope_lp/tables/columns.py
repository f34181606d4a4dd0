"""What the columns of a user's tables are called."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

Names = str | tuple[str, ...]
"""Name of one column, or of several of one kind."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns.

    A destination may have several budgets (`budget` and `cost` are then tuples of equal length, such as money and
    impressions), or an edge several destinations (`destination` is a tuple, such as campaign and advertiser, whose keys
    are all in the table of budgets; `cost` is a tuple too, or one column for all).

    Attributes:
        source: Source of an edge: integers or strings.
        destination: Destination of an edge and of a budget: integers or strings. In the table of budgets the first
            name counts.
        value: Value of an edge.
        cost: What an edge takes from its destination's budget; where the column "cost" is absent, one.
        budget: Right-hand side, in the table of budgets.
        sense: `<=`, `=` or `>=` (the budget is a minimum), in the table of budgets; where the column "sense" is absent,
            `<=`. A tuple where budgets of one destination have different senses: one column for each.
        minimum: Least that a destination must get, beside its budget, in the table of budgets: the row is a range.
            Nulls stand for 0, and so does an absent column "minimum". Only where destinations have one budget with
            sense `<=`.
        upper: Greatest amount of an edge; where the column "upper" is absent, the polytope's own.
        weight: Weight of an edge in its source's cap; where the column "weight" is absent, one.
        cap: Cap of a source, in the table of sources.
    """

    source: str = "source"
    destination: Names = "destination"
    value: str = "value"
    cost: Names = "cost"
    budget: Names = "budget"
    sense: Names = "sense"
    minimum: str = "minimum"
    upper: str = "upper"
    weight: str = "weight"
    cap: str = "cap"

    def __post_init__(self) -> None:
        rows, costs, budgets = (len(names_of(n)) for n in (self.destination, self.cost, self.budget))
        if rows > 1 and budgets > 1:
            raise ValueError("columns: expected several destinations or several budgets, got both")
        if costs not in {1, rows * budgets} or (costs == 1 and budgets > 1):
            raise ValueError(f"columns.cost: expected {rows * budgets} names, got {costs}")
        if len(names_of(self.sense)) not in {1, budgets}:
            raise ValueError(f"columns.sense: expected 1 or {budgets} names, got {len(names_of(self.sense))}")

    def optional(self, name: str, schema: pa.Schema, table: str) -> bool:
        """Whether an optional column is there.

        Args:
            name: Its name.
            schema: Columns of the table.
            table: What the table is called in an error.

        Returns:
            Whether the table has it.

        Raises:
            ValueError: If it is absent although the user named it.
        """
        there = schema.get_field_index(name) >= 0
        if not there and name not in {"cost", "sense", "minimum", "upper", "weight"}:
            raise ValueError(f"{table}: expected a column {name!r}, got {', '.join(schema.names)}")
        return bool(there)


def names_of(names: Names) -> tuple[str, ...]:
    """One or several names as a tuple.

    Args:
        names: A name, or a tuple of them.

    Returns:
        The tuple.
    """
    return (names,) if isinstance(names, str) else tuple(names)


def columns_of(described: dict[str, Any]) -> Columns:
    """The columns that a `problem.json` names.

    Args:
        described: Attributes of `Columns`; lists become tuples.

    Returns:
        The columns.

    Raises:
        ValueError: If an attribute is unknown.
    """
    try:
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
        return Columns(**given)
    except TypeError as error:
        raise ValueError(f"columns: expected attributes of Columns ({error})") from error
