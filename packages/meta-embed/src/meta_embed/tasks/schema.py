"""Which columns of a table mean what: entity, time, label, and the split of the features into member's and row's."""

import math
from typing import Literal

import msgspec


class Feature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One column that a model reads.

    Attributes:
        name: The column.
        kind: `id` for a category (strings or integers), `dense` for numbers.
        buckets: Rows of the table of an `id` column that is hashed; 0 builds a vocabulary from the training events, in
            which row 0 is every other value.
        width: Numbers of a `dense` column: 1, or the length of its lists.
        mean: What is taken off each of them, `width` numbers; absent, the training events' means.
        scale: What they are then divided by, `width` numbers; absent, the training events' standard deviations.
    """

    name: str
    kind: Literal["id", "dense"] = "id"
    buckets: int = 0
    width: int = 1
    mean: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if self.buckets < 0 or self.width < 1:
            raise ValueError(f"{self.name}: expected buckets >= 0 and width >= 1")
        for name, values in (("mean", self.mean), ("scale", self.scale)):
            if values is None:
                continue
            if self.kind != "dense" or len(values) != self.width or not all(math.isfinite(v) for v in values):
                raise ValueError(f"{self.name}: expected {name} of a dense column as {self.width} finite numbers")
            if name == "scale" and min(values) <= 0:
                raise ValueError(f"{self.name}: expected scale > 0, got {min(values):g}")


class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The columns of an event log.

    Attributes:
        entity: Whose events they are: strings or integers, the same in every file.
        time: When an event happened: numbers (seconds) or timestamps.
        label: What is predicted, in [0, 1].
        row: Features of the event and its item (x).
        member: Features of the entity (m), constant in time: those of its first event count.
        weight: Weights of the events; absent, all count one.
        known: When the label was known; absent, at once. A support never holds a label that came after its query.
        event: What identifies an event that is delivered twice; absent, all its columns together.
        base: Logit of a ranker that is already trained, to which the member's part is added.
        vector: Item vector of that ranker (a list of numbers), which then takes the place of a learned one.
        vector_width: Length of `vector`.
    """

    entity: str
    time: str
    label: str
    row: tuple[Feature, ...] = ()
    member: tuple[Feature, ...] = ()
    weight: str | None = None
    known: str | None = None
    event: str | None = None
    base: str | None = None
    vector: str | None = None
    vector_width: int = 0

    def __post_init__(self) -> None:
        """Refuse a split that names a column twice or leaves nothing to score with."""
        names = [f.name for f in (*self.row, *self.member)]
        roles = [n for n in (self.entity, self.time, self.label, self.weight, self.known, self.base, self.vector) if n]
        twice = sorted({n for n in names + roles if (names + roles).count(n) > 1})
        if twice:
            raise ValueError(f"schema: column {', '.join(twice)} has two roles")
        if not self.row and self.vector is None:
            raise ValueError("schema: expected at least one feature of the row, or a column `vector`")
        if (self.vector is None) != (self.vector_width == 0):
            raise ValueError("schema: vector and vector_width go together")

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read, in order."""
        roles = (self.entity, self.time, self.label, self.weight, self.known, self.event, self.base, self.vector)
        return tuple(dict.fromkeys([*filter(None, roles), *(f.name for f in (*self.row, *self.member))]))

    @property
    def dense_row(self) -> tuple[Feature, ...]:
        """Dense columns of a row in the order in which they are stored: base, vector, then the features."""
        fixed = [Feature(self.base, "dense")] if self.base else []
        fixed += [Feature(self.vector, "dense", width=self.vector_width)] if self.vector else []
        return (*fixed, *(f for f in self.row if f.kind == "dense"))
