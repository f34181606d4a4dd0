r"""The long-dwell label: did this impression hold attention longer than most of its kind?

A dwell time says little by itself: a video keeps people longer than a headline, the first position longer than the
tenth. So the label of a row is whether its dwell time exceeds the q-quantile of the dwell times of its context
(position, content type, platform). Quantiles come from histograms over $\log$ time with buckets one per cent wide: one
pass, a few kilobytes per context, and two of them add up, so days, files and machines can be counted apart. A context
with too few rows falls back to a coarser one, the last key dropped first; without any it has the quantile of all rows.

Source: LiRank, arXiv 2402.06859, section 3.5 ("dwell time modeling").
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from core_tensor.app.files import atomic_path, reading
from core_tensor.checks import check_number
from safetensors import safe_open
from safetensors.numpy import save_file

_LOW, _HIGH = 1e-3, 1e7
"""Resolution in seconds."""
_WIDTH = 0.01
_BUCKETS = math.ceil(math.log(_HIGH / _LOW) / _WIDTH)

Context = tuple[str | int | bool | None, ...]


class DwellLabeler:
    """Counts dwell times by context, and labels rows by what it has counted.

    Label a day with the counts of the days before it, then add the day: a threshold that has seen the rows it judges
    knows the future of some of them.

    Args:
        keys: Columns that make the context, the one to drop first last; none for one context.
        quantile: Share of a context's rows that are below its threshold.
        least: Rows that a context needs for its own threshold.
    """

    def __init__(self, keys: Sequence[str], quantile: float = 0.9, least: int = 100) -> None:
        check_number("quantile", quantile, low=0, high=1, open_low=True, open_high=True)
        check_number("least", least, low=1, integer=True)
        if len(set(keys)) != len(keys):
            raise ValueError(f"keys: expected different columns, got {', '.join(keys)}")
        self.keys, self.quantile, self.least = tuple(keys), quantile, least
        self.counts: dict[Context, np.ndarray] = {}

    def add(self, rows: pa.Table, dwell: str = "dwell") -> None:
        """Count rows.

        Args:
            rows: Rows with the keys and the dwell time; nulls in the dwell time are left out.
            dwell: Column of seconds.

        Raises:
            ValueError: If a column is missing or a time is negative or not finite.
        """
        seconds, known = self._seconds(rows, dwell)
        contexts, place = self._contexts(rows)
        bucket = _bucket(seconds[known])
        flat = np.bincount(place[known] * _BUCKETS + bucket, minlength=len(contexts) * _BUCKETS)
        for context, counts in zip(contexts, flat.reshape(-1, _BUCKETS).astype(np.float64), strict=True):
            for depth in range(len(context) + 1):  # the context and all coarser ones
                held = self.counts.get(context[:depth])
                self.counts[context[:depth]] = counts.copy() if held is None else held + counts

    def merge(self, other: "DwellLabeler") -> None:
        """Add what another labeler has counted.

        Args:
            other: A labeler of the same keys.

        Raises:
            ValueError: If its keys differ.
        """
        if other.keys != self.keys:
            raise ValueError(f"other: expected the keys {', '.join(self.keys)}, got {', '.join(other.keys)}")
        for context, counts in other.counts.items():
            held = self.counts.get(context)
            self.counts[context] = counts.copy() if held is None else held + counts

    def fade(self, keep: float) -> None:
        """Let what was counted so far count less; contexts that have faded away are dropped.

        Args:
            keep: What every row so far counts, in (0, 1]: 0.8 per day follows habits within a week.
        """
        check_number("keep", keep, low=0, high=1, open_low=True)
        faded = {context: keep * counts for context, counts in self.counts.items()}
        self.counts = {context: counts for context, counts in faded.items() if counts.sum() >= 1e-3}

    def threshold(self, context: Context) -> float:
        """The dwell time that a row of a context has to exceed.

        Args:
            context: Values of the keys.

        Returns:
            Seconds.

        Raises:
            ValueError: If nothing has been counted.
        """
        for depth in range(len(self.keys), -1, -1):
            counts = self.counts.get(context[:depth])
            if counts is not None and counts.sum() >= (self.least if depth else 1e-9):
                return _quantile(counts, self.quantile)
        raise ValueError("counts: expected rows to be added before any is labeled")

    def label(self, rows: pa.Table, dwell: str = "dwell") -> pa.Array:
        """Whether each row held attention longer than most of its context.

        Args:
            rows: Rows with the keys and the dwell time.
            dwell: Column of seconds.

        Returns:
            int8, 1 for a long dwell, null where the time is null.

        Raises:
            ValueError: If nothing has been counted, or a column is wrong.
        """
        seconds, known = self._seconds(rows, dwell)
        contexts, place = self._contexts(rows)
        thresholds = np.array([self.threshold(context) for context in contexts])
        return pa.array((seconds > thresholds[place]).astype(np.int8), mask=~known)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file.

        Args:
            path: File to write.
        """
        contexts = sorted(self.counts, key=lambda c: (len(c), repr(c)))
        record = {"keys": self.keys, "quantile": self.quantile, "least": self.least, "contexts": contexts}
        counts = np.stack([self.counts[c] for c in contexts]) if contexts else np.zeros((0, _BUCKETS))
        with atomic_path(path) as temporary:
            save_file({"counts": counts}, temporary, {"lirank": json.dumps(record)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DwellLabeler":
        """Read what `save` wrote.

        Args:
            path: File to read.

        Returns:
            The labeler.

        Raises:
            ValueError: If the file is broken or something else.
        """
        with reading(path, "a dwell labeler"), safe_open(path, "numpy") as file:
            record: Mapping[str, Any] = json.loads((file.metadata() or {})["lirank"])
            found = cls(record["keys"], record["quantile"], record["least"])
            counts = file.get_tensor("counts")
            contexts = [tuple(context) for context in record["contexts"]]
            if counts.shape != (len(contexts), _BUCKETS) or not np.isfinite(counts).all() or (counts < 0).any():
                raise ValueError(f"counts of shape {counts.shape} for {len(contexts)} contexts")
            found.counts = dict(zip(contexts, counts, strict=True))
            return found

    def _seconds(self, rows: pa.Table, dwell: str) -> tuple[np.ndarray, np.ndarray]:
        """Times and where they are known."""
        for name in (*self.keys, dwell):
            if name not in rows.column_names:
                raise ValueError(f"{name}: the rows have no such column")
        column = rows[dwell].cast(pa.float64())
        known = ~column.is_null().to_numpy()
        seconds: np.ndarray = column.fill_null(0.0).to_numpy()
        if not (np.isfinite(seconds) & (seconds >= 0)).all():
            raise ValueError(f"{dwell}: expected seconds, not negative and finite")
        return seconds, known

    def _contexts(self, rows: pa.Table) -> tuple[list[Context], np.ndarray]:
        """The different contexts, and the number of each row's."""
        place = np.zeros(rows.num_rows, dtype=np.int64)
        contexts: list[Context] = [()] if rows.num_rows else []
        for key in self.keys:
            column = rows[key].combine_chunks()
            column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
            encoded = column.dictionary_encode("encode")
            values = encoded.dictionary.to_pylist()
            used, place = np.unique(place * max(len(values), 1) + encoded.indices.to_numpy(), return_inverse=True)
            contexts = [(*contexts[u // len(values)], values[u % len(values)]) for u in used.tolist()]
        return contexts, place


def _bucket(seconds: np.ndarray) -> np.ndarray:
    """Bucket of each time."""
    found: np.ndarray = np.floor(np.log(np.clip(seconds, _LOW, _HIGH) / _LOW) / _WIDTH).astype(np.int64)
    return found.clip(0, _BUCKETS - 1)


def _quantile(counts: np.ndarray, q: float) -> float:
    """Quantile of a histogram, interpolated within its bucket."""
    below = np.cumsum(counts)
    target = q * below[-1]
    bucket = int(np.searchsorted(below, target))
    inside = (target - (below[bucket] - counts[bucket])) / counts[bucket]
    return _LOW * math.exp((bucket + float(inside)) * _WIDTH)
