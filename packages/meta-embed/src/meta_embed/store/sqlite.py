"""One SQLite file: for those who want to look into their store with a tool they know."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from core_tensor.app.files import reading

from meta_embed.store.base import Item, pack_info
from meta_embed.store.codec import StoreInfo
from meta_embed.store.files import FileStore

_TABLES = (
    "CREATE TABLE about (id INTEGER PRIMARY KEY CHECK (id = 0), info BLOB NOT NULL)",
    "CREATE TABLE members (key BLOB PRIMARY KEY, value BLOB NOT NULL, history BLOB NOT NULL) WITHOUT ROWID",
)
_UPSERT = (
    "INSERT INTO members VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value,"
    " history = CASE length(excluded.history) WHEN 0 THEN history ELSE excluded.history END"
)
_ASKED_AT_ONCE = 500  # SQLite takes 999 parameters where it is old


class SqliteStore(FileStore):
    """See `FileStore`."""

    format = "SQLite"
    connection: sqlite3.Connection | None = None

    def _open(self, writer: bool) -> bytes | None:
        where = f"{self.path.resolve().as_uri()}?mode={'rw' if writer else 'ro'}"
        # the scorer reads from the threads of its pool
        self.connection = sqlite3.connect(where, uri=True, check_same_thread=False)
        found = self.connection.execute("SELECT info FROM about").fetchone()
        return found[0] if found else None

    def _shut(self) -> None:
        if self.connection is not None:
            self.connection.close()

    @property
    def _sql(self) -> sqlite3.Connection:
        assert self.connection is not None
        return self.connection

    @classmethod
    def _write(cls, path: Path, info: StoreInfo, items: Iterable[Item]) -> None:
        connection = sqlite3.connect(path)
        try:
            with connection:
                for statement in _TABLES:
                    connection.execute(statement)
                connection.executemany("INSERT INTO members VALUES (?, ?, ?)", items)
                connection.execute("INSERT INTO about VALUES (0, ?)", (pack_info(info),))
        finally:
            connection.close()

    def _rows(self, query: str, arguments: Sequence[bytes] = ()) -> Iterator[tuple[bytes, ...]]:
        """Rows of bytes; a corrupt file can hold anything."""
        with reading(self.path, "an intact SQLite store"):
            for row in self._sql.execute(query, arguments):
                if not all(isinstance(value, bytes) for value in row):
                    raise ValueError("a value that is no bytes")
                yield row

    def _select(self, column: str, keys: Sequence[bytes]) -> list[bytes | None]:
        found: dict[bytes, bytes] = {}
        for first in range(0, len(keys), _ASKED_AT_ONCE):
            part = keys[first : first + _ASKED_AT_ONCE]
            marks = ",".join("?" * len(part))
            found.update(self._rows(f"SELECT key, {column} FROM members WHERE key IN ({marks})", part))  # type: ignore[arg-type]
        return [found.get(key) for key in keys]

    def fetch(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        return self._select("value", keys)

    def fetch_history(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        return self._select("history", keys)

    def upsert(self, items: Iterable[Item], info: StoreInfo) -> None:
        """See `Store`."""
        with reading(self.path, "a SQLite store that can be written"), self._sql:
            self._sql.executemany(_UPSERT, items)
            self._sql.execute("INSERT OR REPLACE INTO about VALUES (0, ?)", (pack_info(info),))
        self.info = info

    def items(self) -> Iterator[Item]:
        """See `Store`."""
        yield from self._rows("SELECT key, value, history FROM members ORDER BY key")  # type: ignore[misc]

    def __len__(self) -> int:
        with reading(self.path, "an intact SQLite store"):
            return int(self._sql.execute("SELECT count(*) FROM members").fetchone()[0])
