r"""Labels that arrive after the impression: a row is trained on once, when its label is final.

A click, an application or a purchase can follow an impression by days. A log that is exported at a time `now` shows
such a row as a negative, and a model trained on it learns that recent impressions do not convert. So a label may say
from which column its time of arrival is read and how long it may take (`window`). A row whose age is below the window
is left for the next training; one that is old enough is positive exactly if its label arrived within the window. A run
remembers up to which time it has consumed its log, and the next one goes on there: whatever files it is given, every
row is trained on exactly once, under its final label.

A row that cannot wait is corrected instead. With F(e) the share of the labels that arrive within e, estimated on rows
whose window is over, the loss of a row of age e with observed label o,

$$ \ell = \frac{o}{F(e)} \ell_1 + \Big(1 - \frac{o}{F(e)}\Big) \ell_0 , $$

has the expectation of the loss under the final label: `ArrivalCurve.targets` are the $o / F(e)$.

Sources: Ktena et al., arXiv 1907.06558 (delayed feedback by importance weights); Chapelle, KDD 2014.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from core_tensor.checks import check_number

from lirank.data.batch import label_values
from lirank.data.parquet import ParquetLog
from lirank.schema.columns import as_float, as_times, column_of, decoded, seconds_per_unit
from lirank.schema.features import Label, Schema, column


@dataclass(frozen=True)
class Stretch:
    """A stretch of time of a log, with labels as they are known at its export.

    Attributes:
        log: The log.
        schema: The schema.
        after: Rows at or before this time are left out: an earlier training has consumed them. None for none.
        until: Rows after this time are left out: their labels may still come. None for none.
        now: Time of the export; labels that arrive later are not known yet. None for no such limit.
    """

    log: ParquetLog
    schema: Schema
    after: int | None = None
    until: int | None = None
    now: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the whole log."""
        return self.log.rows

    def require(self, columns: Sequence[str]) -> None:
        """As `ParquetLog.require`."""
        self.log.require(columns)

    def read(self, columns: Sequence[str] | None = None, *, rows: int = 1 << 16) -> Iterator[pa.Table]:
        """As `ParquetLog.read`, without the rows that are left out."""
        time = self.schema.time
        names = columns if columns is None or time is None else list(dict.fromkeys([*columns, time.column]))
        pending: list[pa.Table] = []
        held = 0
        for piece in self.log.read(names, rows=rows):
            kept = piece
            if time is not None and (self.after is not None or self.until is not None):
                kept = piece.filter(pa.array(self._within(as_times(time.column, column_of(piece, time.column)))))
            pending.append(kept if columns is None else kept.select(columns))
            held += kept.num_rows
            if held >= rows:
                whole = pa.concat_tables(pending)
                yield whole.slice(0, rows)
                pending, held = [whole.slice(rows)], held - rows
        if held:
            yield pa.concat_tables(pending)

    def _within(self, times: np.ndarray) -> np.ndarray:
        found = np.ones(len(times), bool)
        if self.after is not None:
            found &= times > self.after
        if self.until is not None:
            found &= times <= self.until
        return found

    def left_out(self) -> tuple[int, int]:
        """Rows that were consumed before, and rows whose labels may still come."""
        if self.schema.time is None or (self.after is None and self.until is None):
            return 0, 0
        name, early, late = self.schema.time.column, 0, 0
        for piece in self.log.read([name], rows=1 << 20):
            times = as_times(name, column_of(piece, name))
            early += 0 if self.after is None else int((times <= self.after).sum())
            late += 0 if self.until is None else int((times > self.until).sum())
        return early, late


def stretch(log: ParquetLog, schema: Schema, after: int | None = None, now: int | None = None) -> Stretch:
    """What a training may consume of a log.

    Args:
        log: The log.
        schema: The schema.
        after: Time up to which an earlier training has consumed it.
        now: Time of the export, in the log's unit; None takes the latest time in the log.

    Returns:
        The rows whose labels are final and that were not consumed before.
    """
    if schema.time is None or not schema.window:
        return Stretch(log, schema, after, None, now)
    names = [schema.time.column, *filter(None, (label.arrival for label in schema.labels))]
    log.require(names)
    if now is None:
        now = max(_latest(name, piece) for piece in log.read(names, rows=1 << 20) for name in names)
    wait = schema.window / seconds_per_unit(log.schema.field(schema.time.column).type, schema.time.unit)
    return Stretch(log, schema, after, int(np.floor(now - wait)), now)


def _latest(name: str, piece: pa.Table) -> int:
    array = column_of(piece, name).drop_null()
    return int(as_times(name, array).max()) if len(array) else int(np.iinfo(np.int64).min)


def settle(table: pa.Table, schema: Schema, seconds: float, now: int | None = None) -> pa.Table:
    """Labels as they are once their windows are over: 1 exactly where they arrived in time.

    Args:
        table: Rows of the log.
        schema: The schema.
        seconds: Seconds per unit of the log's times.
        now: Labels that arrive after this time are not known yet; None for no such limit.

    Returns:
        The table with settled columns of labels.

    Raises:
        ValueError: If a label is 1 without a time of arrival, or arrives before its row.
    """
    for label in schema.labels:
        if label.arrival:
            taken, _ = _taken(table, schema, label)
            values = label_values(label, table)
            in_time = (values == 1) & (taken * seconds <= label.window)
            if now is not None and schema.time is not None:
                in_time &= as_times(schema.time.column, column_of(table, schema.time.column)) + taken <= now
            settled = pa.array(np.where(np.isnan(values), np.nan, in_time), mask=np.isnan(values))
            if label.at_least is not None:  # a label by threshold: what reaches it has settled
                settled = pa.array(np.where(in_time, label.at_least, label.at_least - 1), mask=np.isnan(values))
            table = table.set_column(table.column_names.index(column(label)), column(label), settled)
    return table


def _taken(table: pa.Table, schema: Schema, label: Label) -> tuple[np.ndarray, np.ndarray]:
    """Time from a row to its label, infinite where it has not come, and the values of the label."""
    assert schema.time is not None
    values = label_values(label, table)
    array = decoded(column_of(table, label.arrival))
    null = np.asarray(array.is_null())
    if bool((null & (values == 1)).any()):
        row = int((null & (values == 1)).argmax())
        raise ValueError(f"column {label.arrival!r}: label {label.name!r} is 1 in row {row}, where this is null")
    arrived = array.cast(pa.int64()) if not pa.types.is_floating(array.type) else array
    taken = as_float(label.arrival, arrived) - as_times(schema.time.column, column_of(table, schema.time.column))
    if bool((taken < 0).any()):
        row = int((taken < 0).argmax())
        raise ValueError(f"column {label.arrival!r}: label {label.name!r} of row {row} arrives before the row's time")
    return np.where(null, np.inf, taken), values


class ArrivalCurve:
    """The share of the labels that arrive within an age, from rows whose window is over.

    Args:
        delays: Delays of the labels that arrived, shape (n,).
    """

    def __init__(self, delays: np.ndarray) -> None:
        if len(delays) == 0 or not (np.isfinite(delays) & (delays >= 0)).all():
            raise ValueError("delays: expected at least one, none negative, all finite")
        self._delays = np.sort(delays.astype(np.float64))

    def share(self, age: np.ndarray) -> np.ndarray:
        """Share F(e) of the labels that arrive within an age.

        Args:
            age: Ages, shape (n,).

        Returns:
            Shares in [0, 1], shape (n,).
        """
        found: np.ndarray = np.searchsorted(self._delays, age, side="right") / len(self._delays)
        return found

    def targets(self, observed: np.ndarray, age: np.ndarray, least: float = 0.2) -> np.ndarray:
        r"""Targets $o / F(e)$ of the cross-entropy, whose loss has the expectation of that of the final label.

        Args:
            observed: Labels known so far, 0 or 1, shape (n,).
            age: Ages of the rows, shape (n,).
            least: Rows younger than the age at which this share has arrived get NaN: the target's variance is 1 / F.

        Returns:
            Targets, shape (n,), above 1 for early positives; NaN for rows that are too young.
        """
        check_number("least", least, low=0, high=1, open_low=True)
        share = self.share(age)
        return np.where(share >= least, observed / np.maximum(share, least), np.nan)
