"""New events into a store: only their members are adapted anew, from the events kept beside each vector and new ones.

What comes twice changes nothing, and neither does the order of deliveries, because an event is known by its number and
the latest ones count. So the refreshed store is the one that a generation from all events would have made.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from core_tensor.app.files import reading

from meta_embed.config import Config
from meta_embed.generate import history
from meta_embed.generate.vectors import make_vectors
from meta_embed.model.personalizer import Personalizer
from meta_embed.store.base import Store
from meta_embed.store.codec import encode_records
from meta_embed.store.version import check_version
from meta_embed.tasks.encode import Vocabulary
from meta_embed.tasks.events import Events, build_events, stream_tables


def refresh(
    model: Personalizer,
    config: Config,
    vocabulary: Vocabulary,
    version: str,
    tables: Iterator[pa.Table],
    store: Store,
    *,
    device: str = "cpu",
) -> dict[str, Any]:
    """Bring new events into a store that is open for writing.

    Args:
        model: The model.
        config: Its options.
        vocabulary: Its vocabulary.
        version: Its version, which must be the store's.
        tables: New events, in pieces of any size and order. Each piece is one transaction.
        store: The store.
        device: Where to compute.

    Returns:
        `events` that were delivered, `members` that got a new vector, `new` ones among them.

    Raises:
        ValueError: If versions differ, the store keeps no events, or a history is corrupt.
        TypeError: If the events have keys of another kind than the store.
    """
    check_version(store.info, version, store.where)
    if not store.info.history:
        raise ValueError(f"{store.where}: keeps no events of its members, so it cannot be refreshed; generate anew")
    if store.info.history != history.row_layout(config.columns).itemsize:
        raise ValueError(f"{store.where}: keeps events of other columns than the model's")
    delivered, changed, new = 0, set[Any](), 0
    for table in tables:
        if not table.num_rows:
            continue
        log = build_events(table, config.columns, vocabulary)
        delivered += table.num_rows
        keys = store.keys_of(log.keys.tolist())
        known = store.fetch_history(keys)
        with reading(Path(store.where), "a store with intact histories"):
            before = _histories(log, known, config)
        after = history.merge(before, log, store.info.support)
        moved = np.flatnonzero(
            [h is None or h != a for h, a in zip(known, history.pack(after, config.columns), strict=True)]
        )
        if not len(moved):
            continue
        after = after.choose(moved)
        records = make_vectors(model, after, store.info.precision, device)
        as_of = max(store.info.as_of, float(records.times.max()))
        info = msgspec.structs.replace(store.info, as_of=as_of)
        own = [keys[i] for i in moved.tolist()]
        items = zip(own, encode_records(records, info), history.pack(after, config.columns), strict=True)
        store.upsert(list(items), info)
        new += sum(known[i] is None for i in moved.tolist())
        changed |= set(own)
    return {"events": delivered, "members": len(changed), "new": new}


def _histories(log: Events, known: list[bytes | None], config: Config) -> Events:
    """Histories of the log's members; newcomers have an empty one."""
    nothing = bytes(history.member_layout(config.columns).itemsize)
    return history.unpack(log.keys, [nothing if h is None else h for h in known], config.columns)


def refresh_from_files(
    model: Personalizer, config: Config, vocabulary: Vocabulary, version: str, events: Path, store: Store, device: str
) -> dict[str, Any]:
    """`refresh` with the events of Parquet files.

    Args:
        model: The model.
        config: Its options.
        vocabulary: Its vocabulary.
        version: Its version.
        events: File or folder.
        store: The store, open for writing.
        device: Where to compute.

    Returns:
        See `refresh`.
    """
    tables = stream_tables(events, config.columns)
    return refresh(model, config, vocabulary, version, tables, store, device=device)
