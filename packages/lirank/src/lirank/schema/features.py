"""The schema of a ranking log: columns, their meaning, and every choice that training and serving have to share.

One YAML file describes the log. Training reads it, the run keeps a copy, export and the scorer read that copy: so a
feature is encoded the same way everywhere. Unknown keys are refused.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import yaml
from core_tensor.app.files import write_text
from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$")]

NULL, UNSEEN, RARE, SPECIAL = 0, 1, 2, 3
"""Rows of every id table that are no id: null, never seen in training, seen too rarely; and how many there are."""


class _Part(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Base of all parts: immutable, and a misspelled key is an error."""


class Id(_Part, frozen=True, tag_field="kind", tag="id"):
    """A categorical column: one id per row.

    Attributes:
        name: Name of the feature, which is also its column unless `column` says otherwise.
        column: Column of the log.
        type: Whether the column holds integers or strings. `1` and `"1"` are different ids.
        vocabulary: `hash`: an id falls on one of `rows` rows, nothing is stored. `static`: an id has its own row, from
            a table of 64-bit fingerprints (no strings are kept), up to `rows` of them. `qr`: an id sums two of `rows`
            rows, that of its quotient and that of its remainder, so m + m rows tell m**2 ids apart.
        rows: Rows of the table.
        hashes: How many rows an id sums (hash only); two ids that share one rarely share all.
        min_count: Ids seen less often in training share the rare row.
        missing: `null` gives nulls their own row; `error` refuses them.
    """

    name: Name
    column: str = ""
    type: Literal["int", "string"] = "int"
    vocabulary: Literal["hash", "static", "qr"] = "hash"
    rows: Annotated[int, Meta(ge=4)] = 1 << 16
    hashes: Annotated[int, Meta(ge=1, le=8)] = 1
    min_count: Positive = 1
    missing: Literal["null", "error"] = "null"

    @property
    def columns(self) -> int:
        """Rows of the table that one id sums."""
        return 2 if self.vocabulary == "qr" else self.hashes


class Dense(_Part, frozen=True, tag_field="kind", tag="dense"):
    """A numeric column.

    Attributes:
        name: Name of the feature.
        column: Column of the log.
        transform: `zscore`, `log1p` (then z-score), `quantile` (to a normal distribution) or `none`.
        missing: `error` refuses nulls; `mean` fills in the training mean and adds an indicator input.
    """

    name: Name
    column: str = ""
    transform: Literal["zscore", "log1p", "quantile", "none"] = "zscore"
    missing: Literal["error", "mean"] = "error"


class Multi(_Part, frozen=True, tag_field="kind", tag="multi"):
    """A list column whose ids are averaged or summed.

    Attributes:
        name: Name of the feature.
        column: Column of the log, a list.
        type: Whether the list holds integers or strings.
        vocabulary: As in `Id`.
        rows: Rows of the table.
        min_count: As in `Id`.
        pooling: How the ids of a row are combined.
        length: Ids kept per row, the first ones.
    """

    name: Name
    column: str = ""
    type: Literal["int", "string"] = "int"
    vocabulary: Literal["hash", "static"] = "hash"
    rows: Annotated[int, Meta(ge=4)] = 1 << 16
    min_count: Positive = 1
    pooling: Literal["mean", "sum"] = "mean"
    length: Positive = 50


class History(_Part, frozen=True, tag_field="kind", tag="history"):
    """The last events of a key, from strictly earlier rows: what a user saw, and what came of it.

    Attributes:
        name: Name of the feature.
        key: Id feature whose events are remembered, such as the user.
        item: Id feature that is remembered, such as the item; the sequence shares its table.
        length: Events kept.
        action: Label whose outcome is remembered with the item; empty for none.
        delay: Seconds after an event at which it (and its outcome) is known.
    """

    name: Name
    key: str
    item: str
    length: Annotated[int, Meta(ge=1, le=4096)] = 12
    action: str = ""
    delay: Annotated[float, Meta(ge=0)] = 0.0


class ItemSequence(_Part, frozen=True, tag_field="kind", tag="sequence"):
    """A list column that the log already holds: earlier items, oldest first.

    Attributes:
        name: Name of the feature.
        item: Id feature whose table the sequence shares.
        column: Column of the log, a list.
        length: Items kept, the last ones.
    """

    name: Name
    item: str
    column: str = ""
    length: Annotated[int, Meta(ge=1, le=4096)] = 12


class Popularity(_Part, frozen=True, tag_field="kind", tag="popularity"):
    """How often a key occurred and how often a label followed, counted over strictly earlier rows.

    Gives two inputs: the smoothed rate (clicks + strength * prior) / (count + strength), and log(1 + count).

    Attributes:
        name: Name of the feature.
        key: Id features that make the key: one, or several for their combination.
        label: Label that is counted.
        half_life: Seconds after which an event counts half; 0 for never.
        prior: Rate of a key without events.
        strength: Events that the prior is worth.
        delay: Seconds after an event at which its label is known.
    """

    name: Name
    key: tuple[str, ...]
    label: str
    half_life: Annotated[float, Meta(ge=0)] = 0.0
    prior: Annotated[float, Meta(ge=0, le=1)] = 0.5
    strength: Annotated[float, Meta(gt=0)] = 10.0
    delay: Annotated[float, Meta(ge=0)] = 0.0


Feature = Id | Dense | Multi | History | ItemSequence | Popularity


class Label(_Part, frozen=True):
    """What is predicted: 0 or 1.

    Attributes:
        name: Name of the label.
        column: Column of the log.
        at_least: The label is 1 where the column reaches this value; without it the column must hold 0 and 1.
        missing: `error` refuses nulls; `skip` leaves the row out of this label's loss.
        weight: Share in the loss.
        group: Tasks of one group share a tower.
        arrival: Column of the time at which the label became 1, null where it did not; empty for labels that are known
            at once.
        window: Seconds after the event during which the label may still become 1; a row is trained on when they are
            over, and a label that arrives later counts as 0.
    """

    name: Name
    column: str = ""
    at_least: float | None = None
    missing: Literal["error", "skip"] = "error"
    weight: Annotated[float, Meta(gt=0)] = 1.0
    group: str = ""
    arrival: str = ""
    window: Annotated[float, Meta(ge=0)] = 0.0


class Time(_Part, frozen=True):
    """The event time.

    Attributes:
        column: Column of the log: integers, or timestamps.
        unit: Unit of integers.
    """

    column: str
    unit: Literal["s", "ms", "us", "ns"] = "s"


class Schema(_Part, frozen=True):
    """A ranking log.

    Attributes:
        features: What the model sees.
        labels: What it predicts.
        time: Event time, needed by history, popularity and splits by time.
        group: Id feature within which ranking is judged (GAUC), such as the user.
        weight: Column of row weights; empty for none.
        position: Column of the position shown (integers from 0), for position debiasing; empty for none.
        sampling: Share of the negatives that the log kept; predictions are corrected for it.
        version: Version of this format.
    """

    features: tuple[Feature, ...]
    labels: tuple[Label, ...]
    time: Time | None = None
    group: str = ""
    weight: str = ""
    position: str = ""
    sampling: Annotated[float, Meta(gt=0, le=1)] = 1.0
    version: Literal[1] = 1

    CAUSAL: ClassVar[tuple[type, ...]] = (History, Popularity)

    def __post_init__(self) -> None:
        _check(self)

    def of(self, *kinds: type) -> list[Any]:
        """The features of some kinds.

        Args:
            kinds: Classes of features.

        Returns:
            The features, in the order of the schema.
        """
        return [feature for feature in self.features if isinstance(feature, kinds)]

    def feature(self, name: str) -> Any:
        """The feature of a name.

        Args:
            name: Name of the feature.

        Returns:
            The feature.
        """
        return next(feature for feature in self.features if feature.name == name)

    def label(self, name: str) -> Label:
        """The label of a name.

        Args:
            name: Name of the label.

        Returns:
            The label.
        """
        return next(label for label in self.labels if label.name == name)

    @property
    def causal(self) -> bool:
        """Whether features are computed from earlier rows."""
        return bool(self.of(*self.CAUSAL))

    def columns(self) -> list[str]:
        """Columns that a log has to hold for training.

        Returns:
            Their names.
        """
        found = [column(part) for part in (*self.of(Id, Dense, Multi, ItemSequence), *self.labels)]
        found += [self.time.column] if self.time else []
        found += [label.arrival for label in self.labels]
        return list(dict.fromkeys(filter(None, [*found, self.weight, self.position])))

    @property
    def window(self) -> float:
        """Seconds after which every label of a row is known."""
        return max(label.window for label in self.labels)

    def serving_columns(self) -> list[str]:
        """Columns that a request has to hold: no labels, no weight, no position.

        Returns:
            Their names.
        """
        found = [column(part) for part in self.of(Id, Dense, Multi, ItemSequence)]
        return list(dict.fromkeys([*found, *([self.time.column] if self.time and self.causal else [])]))

    def to_yaml(self) -> str:
        """The schema as text.

        Returns:
            YAML, defaults left out.
        """
        return msgspec.yaml.encode(self).decode()

    def save(self, path: str | Path) -> None:
        """Write the schema as YAML.

        Args:
            path: The file.
        """
        write_text(path, self.to_yaml())


def column(part: Any) -> str:
    """The column that a feature or a label reads."""
    return str(part.column or part.name)


def load_schema(source: str | Path) -> Schema:
    """Read a schema.

    Args:
        source: Path of a YAML file.

    Returns:
        The schema.

    Raises:
        ValueError: If the file is no schema: the message names the key and what was expected.
    """
    return parse_schema(Path(source).read_bytes(), str(source))


def parse_schema(text: str | bytes, name: str = "schema") -> Schema:
    """Read a schema from YAML text.

    Args:
        text: YAML.
        name: What the messages call it.

    Returns:
        The schema.

    Raises:
        ValueError: If the text is no schema.
    """
    try:
        return msgspec.yaml.decode(text, type=Schema)
    except (msgspec.MsgspecError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise ValueError(f"{name}: expected a lirank schema ({reason})") from error


def _check(schema: Schema) -> None:
    names = [part.name for part in (*schema.features, *schema.labels)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"features: the name {name!r} appears twice")
    if not schema.features or not schema.labels:
        raise ValueError(f"{'labels' if schema.features else 'features'}: expected at least one")
    inputs = {column(part) for part in schema.features if not isinstance(part, Schema.CAUSAL)}
    for label in schema.labels:
        if column(label) in inputs:
            raise ValueError(f"{label.name}: the label's column {column(label)!r} is also a feature")
        if (label.arrival or label.window) and (schema.time is None or not (label.arrival and label.window)):
            raise ValueError(
                f"{label.name}: a label that arrives later needs arrival, window, and `time` in the schema"
            )
    for feature in schema.of(Id):
        if feature.vocabulary != "hash" and feature.hashes != 1:
            raise ValueError(f"{feature.name}: hashes belong to a hash vocabulary, got hashes: {feature.hashes}")
        if feature.vocabulary == "qr" and feature.rows < SPECIAL + 2:
            raise ValueError(f"{feature.name}: expected at least {SPECIAL + 2} rows for quotient and remainder")
    ids = {feature.name for feature in schema.of(Id)}
    if schema.group:
        _known("group", [schema.group], ids, "an id feature")
    for feature in schema.of(History, ItemSequence, Popularity):
        _check_references(schema, feature, ids)


def _check_references(schema: Schema, feature: Any, ids: set[str]) -> None:
    """What a feature over other features names must be there."""
    labels = {label.name for label in schema.labels}
    if not isinstance(feature, ItemSequence) and schema.time is None:
        raise ValueError(f"{feature.name}: {type(feature).__name__.lower()} needs `time` in the schema")
    if isinstance(feature, Popularity):
        if not feature.key:
            raise ValueError(f"{feature.name}: expected at least one id feature in key")
        _known(feature.name, feature.key, ids, "an id feature")
        _known(feature.name, [feature.label], labels, "a label")
        return
    _known(feature.name, [feature.item], ids, "an id feature")
    if schema.feature(feature.item).columns != 1:
        raise ValueError(f"{feature.name}: expected an item with one row per id, which a sequence can share")
    if isinstance(feature, History):
        _known(feature.name, [feature.key], ids, "an id feature")
        _known(feature.name, [feature.action] if feature.action else [], labels, "a label")


def _known(name: str, wanted: Sequence[str], known: set[str], what: str) -> None:
    for entry in wanted:
        if entry not in known:
            raise ValueError(f"{name}: expected {what} ({', '.join(sorted(known)) or 'there is none'}), got {entry!r}")
