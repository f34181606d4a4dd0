"""From the schema of an earlier training to that of the next: what may grow, and what becomes of what was learned.

Growth leaves every old score as it is until it is trained: a new id starts with the vector under which it was scored
before (unseen or rare), a hash table grows by whole multiples, so that the rows of an id are copies of its old one, and
numbers keep the statistics they were scaled with.
"""

import msgspec
import numpy as np

from lirank.schema.features import NULL, RARE, SPECIAL, UNSEEN, Id, Multi, Schema
from lirank.schema.vocabulary import Vocabulary


def check_evolution(old: Schema, new: Schema) -> None:
    """Refuse a schema that an earlier training cannot grow into.

    Args:
        old: Schema of the earlier training.
        new: Schema of the next: the same, with features added or id tables grown.

    Raises:
        ValueError: If anything else has changed.
    """
    for name in ("labels", "time", "group", "position", "sampling"):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(f"schema: {name} differs from that of the earlier run; train anew")
    known = {feature.name: feature for feature in new.features}
    for feature in old.features:
        found = known.get(feature.name)
        if found is None:
            raise ValueError(f"{feature.name}: the earlier run has this feature, the schema has not; train anew")
        if isinstance(feature, Id | Multi) and isinstance(found, type(feature)):
            _check_rows(feature, found)
            found = msgspec.structs.replace(found, rows=feature.rows)
        if found != feature:
            raise ValueError(f"{feature.name}: differs from the earlier run's; give a changed feature another name")


def _check_rows(old: Id | Multi, new: Id | Multi) -> None:
    if new.rows == old.rows:
        return
    if new.rows < old.rows:
        raise ValueError(f"{old.name}: expected at least the {old.rows} rows of the earlier run, got {new.rows}")
    if old.vocabulary == "qr":
        raise ValueError(f"{old.name}: a qr table cannot grow, its quotients would change")
    once = old.rows - SPECIAL
    if old.vocabulary == "hash" and (new.rows - SPECIAL) % once:
        raise ValueError(
            f"{old.name}: a hash table grows by whole multiples, so that ids keep their vectors: expected "
            f"{SPECIAL} + k * {once} rows, such as {SPECIAL + 2 * once}, got {new.rows}"
        )


def grown_vocabulary(old: Vocabulary, feature: Id | Multi) -> Vocabulary:
    """What an earlier vocabulary knows, for a feature of at least as many rows."""
    found = Vocabulary.empty(feature)
    if old.static:
        found.keys, found.row = old.keys.copy(), old.row.copy()
        found.counts, found.last = old.counts.copy(), old.last.copy()
    else:
        source = _old_rows(old.feature.rows, feature.rows)
        found.counts, found.last = old.counts[source], old.last[source]
        found.counts[:SPECIAL] = 0
    return found


def row_sources(old: Vocabulary, new: Vocabulary) -> np.ndarray:
    """Old row whose vector each new row starts with, shape (rows,); -1 for a row without an owner.

    Args:
        old: The earlier vocabulary.
        new: The vocabulary that grew out of it.

    Returns:
        Rows of the old table.
    """
    if new.static:
        source = np.full(new.feature.rows, -1)
        source[:SPECIAL] = (NULL, UNSEEN, RARE)
        own = new.row >= SPECIAL
        source[new.row[own]] = old.encode(new.keys[own], np.zeros(int(own.sum()), bool))[:, 0]
        return source
    source = _old_rows(old.feature.rows, new.feature.rows)
    if new.rows_of(np.zeros(1, np.int64)).shape[1] == 1:  # where ids sum rows, a row is not one id's alone
        used = new.counts >= new.feature.min_count
        counts = old.counts[source]
        source = np.where(used & (counts < old.feature.min_count), np.where(counts == 0, UNSEEN, RARE), source)
    return source


def _old_rows(old: int, new: int) -> np.ndarray:
    rows = np.arange(new)
    return np.where(rows < SPECIAL, rows, (rows - SPECIAL) % (old - SPECIAL) + SPECIAL)
