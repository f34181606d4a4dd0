"""One Parquet file: for bulk loads into other systems. A lookup loads the file; an update writes it anew."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from core_tensor.app.files import atomic_path

from meta_embed.store.base import Item, batches, pack_info
from meta_embed.store.codec import StoreInfo
from meta_embed.store.files import FileStore

_COLUMNS = pa.schema([("key", pa.binary()), ("value", pa.binary()), ("history", pa.binary())])
_ABOUT = b"meta_embed"


class ParquetStore(FileStore):
    """See `FileStore`."""

    format = "Parquet"

    def _open(self, writer: bool) -> bytes | None:
        del writer
        table = pq.read_table(self.path)
        if not table.schema.equals(_COLUMNS) or any(column.null_count for column in table.columns):
            raise ValueError(f"columns {', '.join(f'{f.name} ({f.type})' for f in table.schema)}")
        self.table = [table[name].to_pylist() for name in _COLUMNS.names]
        if any(one >= other for one, other in pairwise(self.table[0])):
            raise ValueError("keys out of order")
        return (table.schema.metadata or {}).get(_ABOUT)

    def _shut(self) -> None:
        pass

    def _stamp(self) -> object:
        found = self.path.stat()
        return found.st_ino, found.st_mtime_ns  # an update writes the file anew, and readers hold its content

    @classmethod
    def _write(cls, path: Path, info: StoreInfo, items: Iterable[Item]) -> None:
        schema = _COLUMNS.with_metadata({_ABOUT: pack_info(info)})
        with pq.ParquetWriter(path, schema) as writer:
            writer.write_table(schema.empty_table())
            for batch in batches(items, 50_000):
                columns = [pa.array(list(column), pa.binary()) for column in zip(*batch, strict=True)]
                writer.write_batch(pa.record_batch(columns, schema=schema))

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
        with atomic_path(self.path) as temporary:
            self._write(temporary, info, rows)
        self.opened = self._stamp()
        self.table = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
        self.info = info

    def items(self) -> Iterator[Item]:
        """See `Store`."""
        yield from zip(*self.table, strict=True)

    def __len__(self) -> int:
        return len(self.table[0])
