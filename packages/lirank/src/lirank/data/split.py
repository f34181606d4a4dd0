"""Which rows train, which choose, which test: by time, by each user's last events, or at random."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from core_tensor.checks import check_choice, check_number
from core_tensor.ops.stable_hash import stable_hash

from lirank.data.parquet import Rows
from lirank.schema.columns import as_times, column_of
from lirank.schema.features import Schema, column
from lirank.schema.hashing import fingerprints

TRAIN, VALID, TEST = 0, 1, 2
PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Split:
    """How a log is divided.

    Attributes:
        kind: `time`: the last share of the time tests, the share before it chooses. `user`: the last share of each
            group's events does. `random`: a fixed hash of the row's number decides.
        valid: Share that chooses.
        test: Share that tests.
        future: Must be true for `user` and, where a log has times, `random`: such training data holds other users'
            events from after the tested ones. Causal features stay causal; embeddings and weights do not.
    """

    kind: Literal["time", "user", "random"] = "time"
    valid: float = 0.1
    test: float = 0.1
    future: bool = False

    def __post_init__(self) -> None:
        check_choice("split", self.kind, ("time", "user", "random"))
        check_number("valid", self.valid, low=0, high=1, open_high=True)
        check_number("test", self.test, low=0, high=1, open_high=True)
        if self.valid + self.test >= 1:
            raise ValueError(f"valid, test: expected shares that leave training data, got {self.valid} and {self.test}")


class Splitter:
    """Assigns the rows of a log that is streamed in time order.

    Args:
        log: The log.
        schema: The schema.
        split: How to divide.

    Raises:
        ValueError: If the schema lacks what the split needs, or the split lets the future in unasked.
    """

    def __init__(self, log: Rows, schema: Schema, split: Split) -> None:
        self._schema, self._split = schema, split
        if split.kind == "time" and schema.time is None:
            raise ValueError("split: by time needs `time` in the schema; ask for a random split")
        if split.kind == "user" and not schema.group:
            raise ValueError("split: by user needs `group` in the schema")
        if split.kind != "time" and schema.time is not None and not split.future:
            raise ValueError(
                f"split: {split.kind} lets other users' later events into training; split by time, or say that this is "
                "meant (--allow-future)"
            )
        self._rows = 0
        if split.kind == "time" and schema.time is not None:
            name = schema.time.column
            times = np.concatenate([as_times(name, column_of(t, name)) for t in log.read([name], rows=1 << 20)])
            times.sort()
            ends = [round(len(times) * share) for share in (1 - split.valid - split.test, 1 - split.test)]
            self._bounds = [times[end] if end < len(times) else np.iinfo(np.int64).max for end in ends]
        elif split.kind == "user":
            self._keys, self._counts = self._group_sizes(log)
            self._met = np.zeros(len(self._keys), np.int64)

    def _group(self, table: pa.Table) -> np.ndarray:
        feature = self._schema.feature(self._schema.group)
        return fingerprints(column(feature), column_of(table, column(feature)), feature.type)[0]

    def _group_sizes(self, log: Rows) -> tuple[np.ndarray, np.ndarray]:
        keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for table in log.read([column(self._schema.feature(self._schema.group))], rows=1 << 20):
            new, times = np.unique(self._group(table), return_counts=True)
            keys, place = np.unique(np.concatenate([keys, new]), return_inverse=True)
            counts = np.bincount(place, np.concatenate([counts, times]), len(keys)).astype(np.int64)
        return keys, counts

    def assign(self, table: pa.Table) -> np.ndarray:
        """The part of every row.

        Args:
            table: The next piece of the log, in time order.

        Returns:
            TRAIN, VALID or TEST, shape (n,), int64.
        """
        n, split = table.num_rows, self._split
        if split.kind == "time" and self._schema.time is not None:
            times = as_times(self._schema.time.column, column_of(table, self._schema.time.column))
            return (times >= self._bounds[0]).astype(np.int64) + (times >= self._bounds[1])
        if split.kind == "user":
            place = np.searchsorted(self._keys, self._group(table))
            order = np.argsort(place, kind="stable")
            ordered = place[order]
            first = np.searchsorted(ordered, ordered)
            rank = np.empty(n, np.int64)
            rank[order] = np.arange(n) - first + self._met[ordered]
            self._met += np.bincount(place, minlength=len(self._keys))
            total = self._counts[place]
            left = total - rank  # this event and those after it
            test = np.floor(total * split.test)
            return (left <= test + np.floor(total * split.valid)).astype(np.int64) + (left <= test)
        rows = torch.arange(self._rows, self._rows + n)
        self._rows += n
        share = stable_hash(rows, seed=1, moduli=(1 << 30,))[:, 0].numpy() / (1 << 30)
        return (share < split.valid + split.test).astype(np.int64) + (share < split.test)
