"""The default store: one LMDB file, memory-mapped, read by any number of processes without a server."""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lmdb
from core_tensor.app.files import atomic_path, reading

from meta_embed.store.base import Item, Store, WriterLock, pack_info, unpack_info
from meta_embed.store.codec import StoreInfo

T = TypeVar("T")
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


def _open(path: Path, size: int, *, writable: bool) -> Any:
    """Map a file into memory."""
    with reading(path, "an LMDB store of meta-embed"):
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
            raise ValueError(
                f"{path}: already open in this process, which LMDB allows once: close that first"
            ) from error


class LmdbStore(Store):
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
        try:
            self.env = _open(path, max(_START, path.stat().st_size), writable=writer)
        except BaseException:
            self._release()
            raise
        try:
            self.env.reader_check()  # slots of killed readers
            with reading(path, "an LMDB store of meta-embed"):
                self.vectors = self.env.open_db(b"vectors", create=False)
                self.histories = self.env.open_db(b"histories", create=False)
                with self.env.begin() as txn:
                    raw = txn.get(_ABOUT)
            super().__init__(str(path), unpack_info(raw, str(path)))
        except BaseException:
            self.close()
            raise

    def _read(self, what: Callable[[Any], T]) -> T:
        """Read in a transaction; where another process has grown the file beyond this map, map it anew."""
        with reading(Path(self.where), "an intact LMDB store"):
            try:
                with self.env.begin(buffers=False) as txn:
                    return what(txn)
            except lmdb.MapResizedError:
                self.env.set_mapsize(0)
                with self.env.begin(buffers=False) as txn:
                    return what(txn)

    def fetch(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        return self._read(lambda txn: [txn.get(key, db=self.vectors) for key in keys])

    def fetch_history(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        return self._read(lambda txn: [txn.get(key, db=self.histories) for key in keys])

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
        with self.env.begin() as txn, txn.cursor(db=self.vectors) as cursor:
            for key, value in cursor:
                yield key, value, txn.get(key, db=self.histories) or b""

    def __len__(self) -> int:
        return self._read(lambda txn: int(txn.stat(self.vectors)["entries"]))

    def close(self) -> None:
        """See `Store`."""
        self.env.close()
        self._release()

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None


def create_lmdb(path: Path, info: StoreInfo, items: Iterable[Item]) -> None:
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
            draft = temporary.with_name("draft")
            env = _open(draft, _START, writable=True)
            vectors, histories = env.open_db(b"vectors"), env.open_db(b"histories")
            batch: list[Item] = []
            for item in items:
                batch.append(item)
                if len(batch) == 50_000:
                    _append(env, vectors, histories, batch, info)
                    batch = []
            _append(env, vectors, histories, batch, info)
            _compact(env, temporary)
            env.close()
            # its readers keep the old file and its table of readers; those of the new file start another
            path.with_name(f"{path.name}-lock").unlink(missing_ok=True)
    finally:
        lock.release()


def _append(env: Any, vectors: Any, histories: Any, batch: list[Item], info: StoreInfo) -> None:
    while True:
        try:
            with env.begin(write=True) as txn:
                for key, value, history in batch:
                    if not txn.put(key, value, db=vectors, append=True, overwrite=False):
                        raise ValueError(f"entity: the key {key!r} comes twice")
                    if history:
                        txn.put(key, history, db=histories, append=True)
                txn.put(_ABOUT, pack_info(info))
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])


def _compact(env: Any, target: Path) -> None:
    """Copy the pages in use, in the order of the keys."""
    with target.open("wb") as file:
        env.copyfd(file.fileno(), compact=True)
