"""Events by bucket on disk, so that a log larger than memory can be grouped by member."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
from core_tensor.app.files import atomic_path, reading

from meta_embed.tasks import encode
from meta_embed.tasks.encode import Array
from meta_embed.tasks.events import stream_tables
from meta_embed.tasks.schema import Schema


def bucket_of(keys: pa.Array, buckets: int) -> Array:
    """Bucket of every row by its key's digest, the same on every machine.

    Args:
        keys: Entity keys.
        buckets: Number of buckets.

    Returns:
        Shape (N,), int64.
    """
    encoded = keys.dictionary_encode()
    values = [
        int.from_bytes(hashlib.blake2b(repr(k).encode(), digest_size=8).digest(), "little") % buckets
        for k in encoded.dictionary.to_pylist()
    ]
    found: Array = np.asarray(values or [0], np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
    return found


def spill(events: Path, schema: Schema, folder: Path, buckets: range, total: int) -> str:
    """Read the log once and write each of some buckets to its own file.

    Args:
        events: A Parquet file or a folder of them.
        schema: Their columns.
        folder: Where the files go; each is complete or absent.
        buckets: The buckets to write.
        total: Number of buckets in all.

    Returns:
        Kind of the keys, `int` or `str`.
    """
    writers: dict[int, Any] = {}
    kind = ""
    with atomic_path(folder / "spilled") as mark:
        drafts = mark.parent
        try:
            for table in stream_tables(events, schema):
                keys = encode.entity_keys(schema.entity, table[schema.entity])
                kind = "int" if pa.types.is_integer(keys.type) else "str"
                bucket = bucket_of(keys, total)
                order = np.argsort(bucket, kind="stable")
                cuts = np.searchsorted(bucket[order], [buckets.start, *(b + 1 for b in buckets)])
                for b, first, last in zip(buckets, cuts[:-1], cuts[1:], strict=True):
                    if last > first:
                        if b not in writers:
                            writers[b] = ipc.new_file(str(drafts / f"{b}.arrow"), table.schema)
                        writers[b].write_table(table.take(pa.array(order[first:last])))
        finally:
            for writer in writers.values():
                writer.close()
        for b in writers:
            (drafts / f"{b}.arrow").replace(folder / f"{b}.arrow")
        mark.write_text(kind)
    return kind


def read_spilled(folder: Path, bucket: int) -> pa.Table | None:
    """One bucket of a log.

    Args:
        folder: Where `spill` wrote.
        bucket: Its number.

    Returns:
        The events, or None where the bucket has none.
    """
    path = folder / f"{bucket}.arrow"
    if not path.exists():
        return None
    with reading(path, "events of one bucket"):
        return ipc.open_file(path).read_all()
