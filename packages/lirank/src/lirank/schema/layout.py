"""Where everything in a schema goes in a batch: columns of ids and of numbers, rows of the one fused table."""

from dataclasses import dataclass
from functools import cached_property

from lirank.schema.features import Dense, History, Id, ItemSequence, Multi, Popularity, Schema


@dataclass(frozen=True)
class Layout:
    """Positions that follow from a schema.

    Attributes:
        schema: The schema.
    """

    schema: Schema

    @cached_property
    def offsets(self) -> dict[str, int]:
        """First row of every id feature in the fused table."""
        found, total = {}, 0
        for feature in self.schema.of(Id, Multi):
            found[feature.name] = total
            total += feature.rows
        return found

    @property
    def rows(self) -> int:
        """Rows of the fused table."""
        return sum(feature.rows for feature in self.schema.of(Id, Multi))

    @cached_property
    def fields(self) -> tuple[int, ...]:
        """For every column of ids the number of the id feature it belongs to; one that sums k rows has k columns."""
        ids = self.schema.of(Id)
        return tuple(number for number, feature in enumerate(ids) for _ in range(feature.columns))

    @cached_property
    def dense(self) -> tuple[str, ...]:
        """Names of the columns of numbers, popularity last."""
        plain = [feature.name for feature in self.schema.of(Dense)]
        return (*plain, *(name for feature in self.schema.of(Popularity) for name in popularity_columns(feature)))

    @cached_property
    def sequences(self) -> tuple[History | ItemSequence, ...]:
        """Histories and sequences, which go through the history transformer."""
        return tuple(self.schema.of(History, ItemSequence))

    @cached_property
    def bags(self) -> tuple[Multi, ...]:
        """Multi-valued features, which are pooled."""
        return tuple(self.schema.of(Multi))

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """First row and end of every column of ids, for checks before a runtime."""
        ids = self.schema.of(Id)
        spans = [(self.offsets[f.name], self.offsets[f.name] + f.rows) for f in ids]
        return [spans[number] for number in self.fields]

    def span(self, name: str) -> tuple[int, int]:
        """First row and end of the table of an id, multi, history or sequence feature."""
        feature = self.schema.feature(name)
        owner = self.schema.feature(feature.item) if isinstance(feature, History | ItemSequence) else feature
        return self.offsets[owner.name], self.offsets[owner.name] + owner.rows


def popularity_columns(feature: Popularity) -> tuple[str, str]:
    """Names of the two inputs of a popularity feature."""
    return f"{feature.name}.rate", f"{feature.name}.log_count"


def action_column(feature: History) -> str:
    """Name of the column of outcomes that belongs to a history."""
    return f"{feature.name}.action"
