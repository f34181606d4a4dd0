"""From fingerprints to rows of an embedding table, with separate rows for null, unseen and rare ids.

Rows 0, 1 and 2 are null, unseen and rare. A `hash` or `qr` vocabulary stores how often each row was met in
training, and no ids: an id whose rows were never all met is unseen. A `static` vocabulary stores sorted 64-bit
fingerprints, so 25 million strings are two arrays; two of N strings share a fingerprint with probability N**2 / 2**65.
"""

from dataclasses import dataclass, field

import numpy as np

from lirank.schema.features import NULL, RARE, SPECIAL, UNSEEN, Id, Multi

_GAMMA, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
NEVER = int(np.iinfo(np.int64).min)
"""Time of what was never met, or met in a log without times."""


def hash_rows(fingerprints: np.ndarray, rows: int, hashes: int) -> np.ndarray:
    """Rows [SPECIAL, rows) of each fingerprint under k derived hashes, shape (n, k), as `stable_hash` derives them."""
    modulus = np.uint64(rows - SPECIAL)
    first = fingerprints.view(np.uint64)
    derived = [first] + [_splitmix64(first + np.uint64(j * _GAMMA & _MASK)) for j in range(1, hashes)]
    return np.stack([(h % modulus).astype(np.int64) + SPECIAL for h in derived], 1)


def quotient_rows(fingerprints: np.ndarray, rows: int) -> np.ndarray:
    """Rows of remainder and quotient modulo m = (rows - SPECIAL) // 2, below one another, shape (n, 2)."""
    half = (rows - SPECIAL) // 2
    whole = fingerprints.view(np.uint64)
    remainder, quotient = whole % np.uint64(half), whole // np.uint64(half) % np.uint64(half)
    return np.stack([remainder.astype(np.int64) + SPECIAL, quotient.astype(np.int64) + SPECIAL + half], 1)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: np.ndarray = x ^ (x >> np.uint64(31))
    return found


@dataclass
class Vocabulary:
    """The ids of one feature.

    Attributes:
        feature: The feature of the schema.
        counts: Hash: how often each row was met, shape (rows,). Static: how often each known id was met, shape (n,).
        keys: Static: fingerprints of the known ids, ascending, shape (n,), int64.
        row: Static: row of each known id, shape (n,).
        last: When each row (hash) or known id (static) was last met, in the log's unit of time, shape as `counts`.
    """

    feature: Id | Multi
    counts: np.ndarray
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    row: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    last: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def empty(cls, feature: Id | Multi) -> "Vocabulary":
        """A vocabulary that has seen nothing."""
        size = 0 if feature.vocabulary == "static" else feature.rows
        return cls(feature, np.zeros(size, np.int64), last=np.full(size, NEVER))

    @property
    def static(self) -> bool:
        """Whether ids are known one by one."""
        return self.feature.vocabulary == "static"

    def rows_of(self, fingerprints: np.ndarray) -> np.ndarray:
        """Rows of ids in a vocabulary that stores none, shape (n, rows per id)."""
        if self.feature.vocabulary == "qr":
            return quotient_rows(fingerprints, self.feature.rows)
        return hash_rows(fingerprints, self.feature.rows, self.feature.hashes if isinstance(self.feature, Id) else 1)

    def observe(self, fingerprints: np.ndarray, null: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
        """Count ids of training data; new ids get rows.

        Args:
            fingerprints: Ids, shape (n,).
            null: Which are null, shape (n,).
            times: When they were met, shape (n,); None in a log without times.

        Returns:
            The rows that were met for the first time, which an existing table has to prepare.
        """
        ids, slot, counts = np.unique(fingerprints[~null], return_inverse=True, return_counts=True)
        last = np.full(len(ids), NEVER)
        if times is not None:
            np.maximum.at(last, slot, times[~null])
        if not self.static:
            rows = self.rows_of(ids)
            before = self.counts > 0
            np.add.at(self.counts, rows, counts[:, None])
            np.maximum.at(self.last, rows, last[:, None])
            return np.flatnonzero(~before & (self.counts > 0))
        return self._observe_static(ids, counts, last)

    def _observe_static(self, ids: np.ndarray, counts: np.ndarray, last: np.ndarray) -> np.ndarray:
        # 1. merge what is new; new ids start as rare
        place = np.searchsorted(self.keys, ids)
        known = _found(self.keys, place, ids)
        self.counts[place[known]] += counts[known]
        self.last[place[known]] = np.maximum(self.last[place[known]], last[known])
        self.keys = np.concatenate([self.keys, ids[~known]])
        self.counts = np.concatenate([self.counts, counts[~known]])
        self.last = np.concatenate([self.last, last[~known]])
        self.row = np.concatenate([self.row, np.full(int((~known).sum()), RARE)])
        self._keep(np.argsort(self.keys, kind="stable"))
        # 2. ids that have become frequent get the free rows, the most frequent first
        waiting = np.flatnonzero((self.row == RARE) & (self.counts >= self.feature.min_count))
        waiting = waiting[np.argsort(-self.counts[waiting], kind="stable")]
        free = np.setdiff1d(np.arange(SPECIAL, self.feature.rows), self.row, assume_unique=False)
        given = min(len(waiting), len(free))
        self.row[waiting[:given]] = free[:given]
        return free[:given]

    def _keep(self, chosen: np.ndarray) -> None:
        """Keep some of the known ids, in this order."""
        self.keys, self.counts = self.keys[chosen], self.counts[chosen]
        self.row, self.last = self.row[chosen], self.last[chosen]

    def encode(self, fingerprints: np.ndarray, null: np.ndarray) -> np.ndarray:
        """Rows of ids.

        Args:
            fingerprints: Ids, shape (n,).
            null: Which are null, shape (n,).

        Returns:
            Rows of the feature's table, shape (n, rows per id), int64.
        """
        if not self.static:
            rows = self.rows_of(fingerprints)
            seen = self.counts[rows].min(1)  # the count of a count-min sketch
            rows[seen < self.feature.min_count] = RARE
            rows[seen == 0] = UNSEEN
        else:
            place = np.searchsorted(self.keys, fingerprints)
            known = _found(self.keys, place, fingerprints)
            rows = np.full((len(fingerprints), 1), UNSEEN)
            rows[known, 0] = self.row[place[known]]
        rows[null] = NULL
        return rows

    def evict(self, keep: int) -> np.ndarray:
        """Take their rows from all but the `keep` most frequent ids; they are rare from then on.

        Args:
            keep: Ids that keep their rows.

        Returns:
            The rows that became free.

        Raises:
            ValueError: If the vocabulary hashes, so that a row has no owner.
        """
        if not self.static:
            raise ValueError(
                f"{self.feature.name}: rows of a {self.feature.vocabulary} vocabulary have no owners to rank"
            )
        owners = np.flatnonzero(self.row >= SPECIAL)
        losers = owners[np.argsort(-self.counts[owners], kind="stable")[keep:]]
        freed = np.sort(self.row[losers])
        self.row[losers] = RARE
        return freed

    def forget(self, before: int) -> np.ndarray:
        """Forget what was last met before a time; it is unseen from then on, and its memory is free.

        Args:
            before: Time in the log's unit.

        Returns:
            The rows that became free.
        """
        stale = self.last < before
        if not self.static:
            freed = np.flatnonzero(stale & (self.counts > 0))
            self.counts[stale] = 0
            return freed
        freed = np.sort(self.row[stale & (self.row >= SPECIAL)])
        self._keep(np.flatnonzero(~stale))
        return freed

    def summary(self) -> dict[str, int]:
        """Figures for reports: rows, rows in use, ids known where they are."""
        used = int((self.row >= SPECIAL).sum() if self.static else (self.counts > 0).sum())
        rare = int((self.row == RARE).sum())
        return {"rows": self.feature.rows, "rows_used": used, "ids_known": len(self.keys), "ids_rare": rare}


def _found(keys: np.ndarray, place: np.ndarray, ids: np.ndarray) -> np.ndarray:
    if len(keys) == 0:
        return np.zeros(len(ids), bool)
    found: np.ndarray = keys[np.minimum(place, len(keys) - 1)] == ids
    return found
