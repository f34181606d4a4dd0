"""The default store: one LMDB file, memory-mapped, read by any number of processes without a server."""

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
from core_tensor.app.files import reading

from meta_embed.store.base import Item, batches, pack_info
from meta_embed.store.codec import StoreInfo
from meta_embed.store.files import FileStore

_ABOUT = b"about"
_START = 1 << 26  # bytes of the first map; it doubles when it is full
_META = struct.Struct("<16xI20xI92xQQ")  # magic, page size, last page, transaction of a meta page
_MAGIC = 0xBEEFC0DE
_READERS = 1024  # LMDB's own default is 126, and the 127th reader fails


def _check_length(path: Path) -> None:
    """Refuse a truncated file: reading a page behind its end would end the process with SIGBUS.

    Both of LMDB's meta pages name the last page in use and their transaction; the later one counts.

    Raises:
        ValueError: If it is, or has no header.
    """
    with path.open("rb") as file:
        head = file.read(_META.size)
        size = path.stat().st_size
        if len(head) < _META.size:
            raise ValueError(f"a file of {size} bytes")
        magic, page, last, transaction = _META.unpack(head)
        if magic != _MAGIC or not (page >= 512 and page & (page - 1) == 0):
            raise ValueError("no LMDB header")
        file.seek(page)
        second = file.read(_META.size)
        if len(second) < _META.size or _META.unpack(second)[0] != _MAGIC:
            raise ValueError("no second LMDB header")
        _, _, other_last, other_transaction = _META.unpack(second)
        used = (last if transaction >= other_transaction else other_last) + 1
        if used * page > size:
            raise ValueError(f"truncated: {size} bytes of {used * page}")


def _map(path: Path, size: int, *, writable: bool) -> Any:
    """Map a file into memory."""
    if path.exists():
        _check_length(path)
    try:
        return lmdb.open(
            str(path), subdir=False, max_dbs=3, max_readers=_READERS, map_size=size, readonly=not writable,
            readahead=False, create=writable, metasync=writable,
        )  # fmt: skip
    except lmdb.Error as error:
        if "already open in this process" not in str(error):
            raise
        raise ValueError(f"{path}: already open in this process, which LMDB allows once: close that first") from error


class LmdbStore(FileStore):
    """See `FileStore`."""

    format = "LMDB"
    env: Any = None

    def _open(self, writer: bool) -> bytes | None:
        self.env = _map(self.path, max(_START, self.path.stat().st_size), writable=writer)
        self.env.reader_check()  # slots of killed readers
        self.vectors = self.env.open_db(b"vectors", create=False)
        self.histories = self.env.open_db(b"histories", create=False)
        with self.env.begin() as txn:
            found: bytes | None = txn.get(_ABOUT)
            return found

    def _shut(self) -> None:
        if self.env is not None:
            self.env.close()

    @classmethod
    def _write(cls, path: Path, info: StoreInfo, items: Iterable[Item]) -> None:
        env = _map(path.with_name("draft"), _START, writable=True)
        try:
            vectors, histories = env.open_db(b"vectors"), env.open_db(b"histories")
            _append(env, vectors, histories, [], info)
            for batch in batches(items, 50_000):
                _append(env, vectors, histories, batch, info)
            with path.open("wb") as file:  # the pages in use, in the order of the keys
                env.copyfd(file.fileno(), compact=True)
        finally:
            env.close()

    @classmethod
    def _before_replacing(cls, path: Path) -> None:
        # its readers keep the old file and its table of readers; those of the new file start another
        path.with_name(f"{path.name}-lock").unlink(missing_ok=True)

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        """A transaction; where another process has grown the file beyond this map, it is mapped anew."""
        with reading(self.path, "an intact LMDB store"):
            try:
                txn = self.env.begin()
            except lmdb.MapResizedError:
                self.env.set_mapsize(0)
                txn = self.env.begin()
            with txn:
                yield txn

    def fetch(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        with self._reading() as txn:
            return [txn.get(key, db=self.vectors) for key in keys]

    def fetch_history(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        with self._reading() as txn:
            return [txn.get(key, db=self.histories) for key in keys]

    def upsert(self, items: Iterable[Item], info: StoreInfo) -> None:
        """See `Store`."""
        listed = list(items)
        while True:
            try:
                with self.env.begin(write=True) as txn:
                    for key, value, history in listed:
                        txn.put(key, value, db=self.vectors)
                        if history:
                            txn.put(key, history, db=self.histories)
                    txn.put(_ABOUT, pack_info(info))
                break
            except lmdb.MapFullError:  # the transaction is undone; double the map and do it again
                self.env.set_mapsize(2 * self.env.info()["map_size"])
            except lmdb.MapResizedError:
                self.env.set_mapsize(0)
        self.info = info

    def items(self) -> Iterator[Item]:
        """See `Store`."""
        with self._reading() as txn, txn.cursor(db=self.vectors) as cursor:
            for key, value in cursor:
                yield key, value, txn.get(key, db=self.histories) or b""

    def __len__(self) -> int:
        with self._reading() as txn:
            return int(txn.stat(self.vectors)["entries"])


def _append(env: Any, vectors: Any, histories: Any, batch: list[Item], info: StoreInfo) -> None:
    while True:
        try:
            with env.begin(write=True) as txn:
                for key, value, history in batch:
                    txn.put(key, value, db=vectors, append=True)
                    if history:
                        txn.put(key, history, db=histories, append=True)
                txn.put(_ABOUT, pack_info(info))
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])
