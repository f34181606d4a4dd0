"""One SQLite file: for those who want to look into their store with a tool they know."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from core_tensor.app.files import atomic_path, reading

from meta_embed.store.base import Item, Store, WriterLock, pack_info, unpack_info
from meta_embed.store.codec import StoreInfo

_TABLES = (
    "CREATE TABLE about (id INTEGER PRIMARY KEY CHECK (id = 0), info BLOB NOT NULL)",
    "CREATE TABLE members (key BLOB PRIMARY KEY, value BLOB NOT NULL, history BLOB NOT NULL) WITHOUT ROWID",
)
_ASKED_AT_ONCE = 500  # SQLite takes 999 parameters where it is old


class SqliteStore(Store):
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
        self.lock = WriterLock(path) if writer else None
        self.path = path
        mode = "rw" if writer else "ro"
        # the scorer reads from the threads of its pool
        self.connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, check_same_thread=False)
        try:
            with reading(path, "a SQLite store of meta-embed"):
                found = self.connection.execute("SELECT info FROM about").fetchone()
            super().__init__(str(path), unpack_info(found[0] if found else None, str(path)))
        except BaseException:
            self.close()
            raise

    def _select(self, column: str, keys: Sequence[bytes]) -> list[bytes | None]:
        found: dict[bytes, bytes] = {}
        with reading(self.path, "an intact SQLite store"):
            for first in range(0, len(keys), _ASKED_AT_ONCE):
                part = keys[first : first + _ASKED_AT_ONCE]
                marks = ",".join("?" * len(part))
                found.update(self.connection.execute(f"SELECT key, {column} FROM members WHERE key IN ({marks})", part))
        return [found.get(key) for key in keys]

    def fetch(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        return self._select("value", keys)

    def fetch_history(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        return self._select("history", keys)

    def upsert(self, items: Iterable[Item], info: StoreInfo) -> None:
        """See `Store`."""
        with reading(self.path, "a SQLite store that can be written"), self.connection:
            self.connection.executemany("INSERT OR REPLACE INTO members VALUES (?, ?, ?)", items)
            self.connection.execute("INSERT OR REPLACE INTO about VALUES (0, ?)", (pack_info(info),))
        self.info = info

    def items(self) -> Iterator[Item]:
        """See `Store`."""
        with reading(self.path, "an intact SQLite store"):
            yield from self.connection.execute("SELECT key, value, history FROM members ORDER BY key")

    def __len__(self) -> int:
        with reading(self.path, "an intact SQLite store"):
            return int(self.connection.execute("SELECT count(*) FROM members").fetchone()[0])

    def close(self) -> None:
        """See `Store`."""
        self.connection.close()
        if self.lock is not None:
            self.lock.release()
            self.lock = None


def create_sqlite(path: Path, info: StoreInfo, items: Iterable[Item]) -> None:
    """Write a complete store, in place of one that may be there: the same items give the same bytes.

    Args:
        path: The file.
        info: What it says about itself.
        items: Every member, in the order of the keys.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(path)
    try:
        with atomic_path(path) as temporary:
            connection = sqlite3.connect(temporary)
            with connection:
                for statement in _TABLES:
                    connection.execute(statement)
                connection.executemany("INSERT INTO members VALUES (?, ?, ?)", items)
                connection.execute("INSERT INTO about VALUES (0, ?)", (pack_info(info),))
            connection.close()
    finally:
        lock.release()
