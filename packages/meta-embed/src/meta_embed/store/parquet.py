"""One Parquet file: for bulk loads into other systems. A lookup loads the file; an update writes it anew."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from core_tensor.app.files import atomic_path, reading

from meta_embed.store.base import Item, Store, WriterLock, pack_info, unpack_info
from meta_embed.store.codec import StoreInfo

_COLUMNS = pa.schema([("key", pa.binary()), ("value", pa.binary()), ("history", pa.binary())])
_ABOUT = b"meta_embed"


class ParquetStore(Store):
    """See `Store`.

    Args:
        path: The file.
        writer: Whether to write; one process at a time.

    Raises:
        ValueError: If the file is no store, or another writer holds it.
        FileNotFoundError: If there is none.
    """

    def __init__(self, path: Path, *, writer: bool = False) -> None:
        if not path.is_file():
            raise FileNotFoundError(2, "No such store", str(path))
        self.path, self.lock = path, WriterLock(path) if writer else None
        try:
            with reading(path, "a Parquet store of meta-embed"):
                table = pq.read_table(path)
                if table.schema.names != _COLUMNS.names:
                    raise ValueError(f"columns {', '.join(table.schema.names)}")
                raw = (table.schema.metadata or {}).get(_ABOUT)
                self.table = [table[name].to_pylist() for name in _COLUMNS.names]
            super().__init__(str(path), unpack_info(raw, str(path)))
        except BaseException:
            self.close()
            raise

    def _pick(self, column: int, keys: Sequence[bytes]) -> list[bytes | None]:
        sorted_keys, values = self.table[0], self.table[column]
        places = [bisect_left(sorted_keys, key) for key in keys]
        return [
            values[place] if place < len(sorted_keys) and sorted_keys[place] == key else None
            for key, place in zip(keys, places, strict=True)
        ]

    def fetch(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        return self._pick(1, keys)

    def fetch_history(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        return self._pick(2, keys)

    def upsert(self, items: Iterable[Item], info: StoreInfo) -> None:
        """See `Store`."""
        merged = {key: (value, history) for key, value, history in self.items()}
        for key, value, history in items:
            merged[key] = (value, history or merged.get(key, (b"", b""))[1])
        rows = [(key, *merged[key]) for key in sorted(merged)]
        _write(self.path, info, rows)
        self.table = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
        self.info = info

    def items(self) -> Iterator[Item]:
        """See `Store`."""
        yield from zip(*self.table, strict=True)

    def __len__(self) -> int:
        return len(self.table[0])

    def close(self) -> None:
        """See `Store`."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None


def create_parquet(path: Path, info: StoreInfo, items: Iterable[Item]) -> None:
    """Write a complete store, in place of one that may be there: the same items give the same bytes.

    Args:
        path: The file.
        info: What it says about itself.
        items: Every member, in the order of the keys.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(path)
    try:
        _write(path, info, items)
    finally:
        lock.release()


def _write(path: Path, info: StoreInfo, items: Iterable[Item]) -> None:
    schema = _COLUMNS.with_metadata({_ABOUT: pack_info(info)})
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        batch: list[Item] = []
        for item in items:
            batch.append(item)
            if len(batch) == 50_000:
                writer.write_batch(_batch(batch, schema))
                batch = []
        writer.write_batch(_batch(batch, schema))


def _batch(batch: list[Item], schema: pa.Schema) -> pa.RecordBatch:
    columns = zip(*batch, strict=True) if batch else ((), (), ())
    return pa.record_batch([pa.array(list(c), pa.binary()) for c in columns], schema=schema)
