"""From Arrow columns to the tensors of a model, by the same code in training and in serving."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lirank.schema.columns import as_float, as_lists, as_times, column_of
from lirank.schema.features import Dense, History, Id, ItemSequence, Label, Multi, Schema, column
from lirank.schema.hashing import fingerprints
from lirank.schema.layout import Layout, action_column
from lirank.schema.transforms import KNOTS, DenseStatistics
from lirank.schema.vocabulary import Vocabulary

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Ragged:
    """Lists of rows of the fused table.

    Attributes:
        values: All lists in a row, shape (n,), int64.
        offsets: Where each list begins and the last one ends, shape (B + 1,), int64.
        actions: What came of each item (0, 1, or 2 for unknown), shape (n,), int64; empty where nothing is remembered.
    """

    values: Tensor
    offsets: Tensor
    actions: Tensor

    def take(self, rows: Tensor) -> "Ragged":
        """The lists of some rows."""
        lengths = self.offsets.diff()[rows]
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        starts = self.offsets[rows] - ends[:-1]
        index = starts.repeat_interleave(lengths) + torch.arange(int(ends[-1]))
        return Ragged(self.values[index], ends, self.actions[index] if len(self.actions) else self.actions)


@dataclass(frozen=True)
class Batch:
    """Rows of a log as tensors; all but `ids`, `dense` and `lists` are absent when scoring.

    Attributes:
        ids: Rows of the fused table, one per column of ids, shape (B, F), int64.
        dense: Numbers as they came, NaN where missing, shape (B, N), float32.
        lists: Multi-valued features, histories and sequences by name.
        labels: 0, 1, or NaN where a label may be missing, shape (B, T), float32.
        weight: Row weights, shape (B,), float32.
        group: Fingerprint of the ranking group, shape (B,), int64.
        position: Position shown, shape (B,), int64.
        time: Event time, shape (B,), int64.
    """

    ids: Tensor
    dense: Tensor
    lists: Mapping[str, Ragged]
    labels: Tensor | None = None
    weight: Tensor | None = None
    group: Tensor | None = None
    position: Tensor | None = None
    time: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor) -> "Batch":
        """Some rows of the batch.

        Args:
            rows: Which, shape (b,), int64.

        Returns:
            The smaller batch.
        """
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lists"}
        taken = {name: None if value is None else value[rows] for name, value in plain.items()}
        return Batch(lists={name: entry.take(rows) for name, entry in self.lists.items()}, **taken)  # type: ignore[arg-type]


class Encoder:
    """What a schema has learned from training data: vocabularies and statistics of the numbers.

    Args:
        schema: The schema.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.layout = Layout(schema)
        self.vocabularies = {feature.name: Vocabulary.empty(feature) for feature in schema.of(Id, Multi)}
        self.statistics = {name: DenseStatistics() for name in self.layout.dense}
        self.settled: frozenset[str] = frozenset()  # numbers whose statistics an earlier training has fixed

    # ------------------------------------------------------------------------------------------------------------------

    def observe(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Learn from a piece of training data.

        Args:
            table: Columns of the log, with those of causal features.

        Returns:
            For every id feature the rows of its table that were met for the first time.
        """
        fresh, times = {}, None
        if self.schema.time:
            times = as_times(self.schema.time.column, column_of(table, self.schema.time.column))
        for feature in self.schema.of(Id):
            ids, null = fingerprints(column(feature), column_of(table, column(feature)), feature.type)
            fresh[feature.name] = self.vocabularies[feature.name].observe(ids, null, times)
        for feature in self.schema.of(Multi):
            values, offsets = as_lists(column(feature), column_of(table, column(feature)))
            ids, null = fingerprints(column(feature), values, feature.type)
            when = None if times is None else np.repeat(times, np.diff(offsets))
            fresh[feature.name] = self.vocabularies[feature.name].observe(ids, null, when)
        for name, values in zip(self.layout.dense, self._dense(table).T, strict=True):
            if name in self.settled:
                continue
            transform = self.transform(name)
            self.statistics[name].observe(np.log1p(values) if transform == "log1p" else values)
        return fresh

    def check_columns(self) -> list[str]:
        """Columns that cannot help: a number that never varies, an id that is always null.

        Returns:
            One line for each.
        """
        found = [
            f"{name}: {'no values' if s.count == 0 else f'always {s.mean:g}'}"
            for name, s in self.statistics.items()
            if s.count == 0 or s.low == s.high
        ]
        empty = [name for name, v in self.vocabularies.items() if v.counts.sum() == 0]
        return found + [f"{name}: always null" for name in empty]

    def transform(self, name: str) -> str:
        """Transform of a column of numbers; popularity is standardized.

        Args:
            name: Name of the column.

        Returns:
            `zscore`, `log1p`, `quantile` or `none`.
        """
        dense = {feature.name: feature.transform for feature in self.schema.of(Dense)}
        return str(dense.get(name, "zscore"))

    # ------------------------------------------------------------------------------------------------------------------

    def encode(self, table: pa.Table, *, labels: bool = True) -> Batch:
        """Turn columns into a batch.

        Args:
            table: Columns of the log, with those of causal features.
            labels: Whether labels, weights, group and position are wanted.

        Returns:
            The batch.

        Raises:
            ValueError: If a column is of another type, a number is NaN or infinite, a null is not allowed, or a label
                is neither 0 nor 1; the message names column and row.
        """
        ids = [self._ids(table, feature) for feature in self.schema.of(Id)]
        lists = {feature.name: self._bag(table, feature) for feature in self.layout.bags}
        lists |= {feature.name: self._sequence(table, feature) for feature in self.layout.sequences}
        width = len(self.layout.fields)
        batch = Batch(
            torch.from_numpy(np.concatenate(ids, 1) if ids else np.zeros((table.num_rows, width), np.int64)),
            torch.from_numpy(self._dense(table).astype(np.float32)),
            lists,
        )
        return replace(batch, **self._targets(table)) if labels else batch  # type: ignore[arg-type]

    def _ids(self, table: pa.Table, feature: Id) -> np.ndarray:
        name = column(feature)
        ids, null = fingerprints(name, column_of(table, name), feature.type)
        if feature.missing == "error" and null.any():
            raise ValueError(f"column {name!r}: row {int(null.argmax())} is null")
        return self.vocabularies[feature.name].encode(ids, null) + self.layout.offsets[feature.name]

    def _bag(self, table: pa.Table, feature: Multi) -> Ragged:
        name = column(feature)
        values, offsets = as_lists(name, column_of(table, name))
        ids, null = fingerprints(name, values, feature.type)
        rows = self.vocabularies[feature.name].encode(ids, null)[:, 0] + self.layout.offsets[feature.name]
        return _cut(rows, offsets, np.zeros(0, np.int64), feature.length, last=False)

    def _sequence(self, table: pa.Table, feature: History | ItemSequence) -> Ragged:
        item = self.schema.feature(feature.item)
        name = feature.name if isinstance(feature, History) else column(feature)
        values, offsets = as_lists(name, column_of(table, name))
        actions = np.zeros(0, np.int64)
        if isinstance(feature, History):  # already fingerprints
            ids, null = np.asarray(values, dtype=np.int64), np.zeros(len(values), bool)
            if feature.action:
                actions = np.asarray(as_lists(name, column_of(table, action_column(feature)))[0]).astype(np.int64)
        else:
            ids, null = fingerprints(name, values, item.type)
        rows = self.vocabularies[item.name].encode(ids, null)[:, 0] + self.layout.offsets[item.name]
        return _cut(rows, offsets, actions, feature.length, last=True)

    def _dense(self, table: pa.Table) -> np.ndarray:
        found = np.empty((table.num_rows, len(self.layout.dense)))
        dense = {feature.name: feature for feature in self.schema.of(Dense)}
        for j, name in enumerate(self.layout.dense):
            feature = dense.get(name)
            source = column(feature) if feature else name
            array = column_of(table, source)
            found[:, j] = values = as_float(source, array)
            null = np.asarray(array.is_null())
            bad = ~(np.abs(values) <= _LARGEST) & ~null
            if bad.any():
                row = int(bad.argmax())
                raise ValueError(f"column {source!r}: expected finite numbers of float32, row {row} is {values[row]}")
            if null.any() and (feature is None or feature.missing == "error"):
                raise ValueError(f"column {source!r}: row {int(null.argmax())} is null (see `missing: mean`)")
            if feature and feature.transform == "log1p" and (values <= -1).any():
                row = int((values <= -1).argmax())
                raise ValueError(f"column {source!r}: log1p needs values above -1, row {row} is {values[row]}")
        return found

    def _targets(self, table: pa.Table) -> dict[str, Tensor]:
        schema, found = self.schema, {}
        columns = [label_values(label, table) for label in schema.labels]
        found["labels"] = torch.from_numpy(np.stack(columns, 1).astype(np.float32))
        if schema.weight:
            weight = as_float(schema.weight, column_of(table, schema.weight))
            bad = ~(np.isfinite(weight) & (weight >= 0))
            if bad.any():
                raise ValueError(
                    f"column {schema.weight!r}: expected weights of at least 0, row {int(bad.argmax())} is "
                    f"{weight[bad.argmax()]}"
                )
            found["weight"] = torch.from_numpy(weight.astype(np.float32))
        if schema.group:
            feature = schema.feature(schema.group)
            found["group"] = torch.from_numpy(
                fingerprints(column(feature), column_of(table, column(feature)), feature.type)[0]
            )
        if schema.position:
            position = as_float(schema.position, column_of(table, schema.position))
            if not (np.isfinite(position) & (position >= 0)).all():
                raise ValueError(f"column {schema.position!r}: expected positions from 0")
            found["position"] = torch.from_numpy(position.astype(np.int64))
        if schema.time:
            found["time"] = torch.from_numpy(as_times(schema.time.column, column_of(table, schema.time.column)))
        return found

    # ------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """What was learned.

        Returns:
            Everything, as arrays by name.
        """
        found: dict[str, np.ndarray] = {}
        for name, vocabulary in self.vocabularies.items():
            found[f"vocabulary.{name}.counts"] = vocabulary.counts
            found[f"vocabulary.{name}.last"] = vocabulary.last
            if vocabulary.static:
                found[f"vocabulary.{name}.keys"] = vocabulary.keys
                found[f"vocabulary.{name}.row"] = vocabulary.row
        for name, s in self.statistics.items():
            found[f"dense.{name}.moments"] = np.array([s.count, s.mean, s.squares, s.low, s.high, s.stride])
            found[f"dense.{name}.sample"] = s.sample
        return found

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned.

        Args:
            state: Arrays by name.

        Raises:
            ValueError: If an array is missing or of another shape: the state of another schema.
        """
        try:
            for name, vocabulary in self.vocabularies.items():
                counts, last = state[f"vocabulary.{name}.counts"], state[f"vocabulary.{name}.last"]
                if not vocabulary.static and len(counts) != vocabulary.feature.rows:
                    raise ValueError(f"{name}: expected {vocabulary.feature.rows} rows, the state has {len(counts)}")
                if last.shape != counts.shape:
                    raise ValueError(f"{name}: expected {len(counts)} times, the state has {len(last)}")
                vocabulary.counts, vocabulary.last = counts, last
                if vocabulary.static:
                    keys, row = state[f"vocabulary.{name}.keys"], state[f"vocabulary.{name}.row"]
                    if not len(keys) == len(row) == len(counts) or (len(row) and row.max() >= vocabulary.feature.rows):
                        raise ValueError(f"{name}: the state's vocabulary does not fit {vocabulary.feature.rows} rows")
                    vocabulary.keys, vocabulary.row = keys, row
            for name in self.statistics:
                count, mean, squares, low, high, stride = state[f"dense.{name}.moments"].tolist()
                sample = state[f"dense.{name}.sample"]
                self.statistics[name] = DenseStatistics(int(count), mean, squares, low, high, sample, int(stride))
        except KeyError as error:
            raise ValueError(f"state: {error.args[0]} is missing; it belongs to another schema") from error

    def knots(self) -> np.ndarray:
        """Quantiles of every column of numbers.

        Returns:
            Quantiles, shape (N, KNOTS).
        """
        knots = [statistics.knots() for statistics in self.statistics.values()]
        return np.stack(knots) if knots else np.zeros((0, KNOTS))


def label_values(label: Label, table: pa.Table) -> np.ndarray:
    """A label's values: 0 or 1, NaN where it may be missing.

    Args:
        label: The label.
        table: Columns of the log.

    Returns:
        Values, shape (n,), float64.

    Raises:
        ValueError: If a value is neither 0 nor 1, or null where that is not allowed.
    """
    name = column(label)
    array = column_of(table, name)
    values = as_float(name, array)
    null = np.asarray(array.is_null())
    if null.any() and label.missing == "error":
        raise ValueError(f"column {name!r}: label {label.name!r} is null in row {int(null.argmax())}")
    if label.at_least is not None:
        bad = np.isnan(values) & ~null
        values = np.where(np.isnan(values), np.nan, values >= label.at_least)
    else:
        bad = ~null & (values != 0) & (values != 1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"column {name!r}: expected labels 0 and 1, row {row} is {values[row]:g}")
    return values


def _cut(rows: np.ndarray, offsets: np.ndarray, actions: np.ndarray, length: int, *, last: bool) -> Ragged:
    """Lists cut to a length, keeping their last or first entries."""
    lengths = np.diff(offsets)
    kept = np.minimum(lengths, length)
    if (kept == lengths).all():
        return Ragged(torch.from_numpy(rows), torch.from_numpy(offsets), torch.from_numpy(actions))
    ends = np.concatenate([[0], kept.cumsum()])
    starts = offsets[1:] - kept if last else offsets[:-1]
    index = np.repeat(starts - ends[:-1], kept) + np.arange(ends[-1])
    actions = actions[index] if len(actions) else actions
    return Ragged(torch.from_numpy(rows[index]), torch.from_numpy(ends), torch.from_numpy(actions))
