"""What stores that are one file share: existence, the writer's lock, replacement in one go, closing."""

import fcntl
import os
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Self

from core_tensor.app.files import atomic_path, reading

from meta_embed.store.base import Item, Store, unpack_info
from meta_embed.store.codec import StoreInfo


class FileStore(Store):
    """See `Store`. A backend says how to open, shut and write its file.

    Args:
        path: The file.
        writer: Whether to write; one process at a time.

    Raises:
        ValueError: If the file is no store, or another writer holds it.
        FileNotFoundError: If there is none.
    """

    format: ClassVar[str]

    def __init__(self, path: Path, *, writer: bool = False) -> None:
        if not path.is_file():
            raise FileNotFoundError(2, "No such store", str(path))
        self.path, self.lock = path, WriterLock(path) if writer else None
        try:
            with reading(path, f"a {self.format} store of meta-embed"):
                self.opened = self._stamp()
                raw = self._open(writer)
            super().__init__(str(path), unpack_info(raw, str(path)))
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _open(self, writer: bool) -> bytes | None:
        """Open the file; what it says about itself."""

    @abstractmethod
    def _shut(self) -> None:
        """Close what `_open` has opened, should it have come so far."""

    @classmethod
    @abstractmethod
    def _write(cls, path: Path, info: StoreInfo, items: Iterable[Item]) -> None:
        """Write a complete file: the same items give the same bytes."""

    def _stamp(self) -> object:
        """What differs once the file is another one."""
        return self.path.stat().st_ino

    def replaced(self) -> bool:
        """See `Store`."""
        return self._stamp() != self.opened

    def close(self) -> None:
        """See `Store`."""
        self._shut()
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    @classmethod
    def create(cls, path: Path, info: StoreInfo, items: Iterable[Item]) -> None:
        """Write a complete store, in place of one that may be there; its readers keep the old one.

        Args:
            path: The file.
            info: What it says about itself.
            items: Every member, in the order of the keys.

        Raises:
            ValueError: If another writer holds the store.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with WriterLock(path), atomic_path(path) as temporary:
            cls._write(temporary, info, items)
            cls._before_replacing(path)

    @classmethod
    def _before_replacing(cls, path: Path) -> None:
        """Clear away what belongs to the old file."""


def check_free(path: Path) -> None:
    """Refuse a store that another writer holds; several may ask at the same time.

    Args:
        path: The store's file.

    Raises:
        ValueError: If one does.
    """
    if path.parent.is_dir():
        WriterLock(path, fcntl.LOCK_SH).release()


class WriterLock:
    """A file that one writer holds; the lock goes with the process, so a kill leaves none.

    Args:
        path: The store's file; the lock lies beside it.
        kind: `fcntl.LOCK_EX` to write.

    Raises:
        ValueError: If another writer holds it.
    """

    def __init__(self, path: Path, kind: int = fcntl.LOCK_EX) -> None:
        lock = path.with_name(f".{path.name}.writer")
        self.handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.handle, kind | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self.handle)
            if isinstance(error, BlockingIOError):
                raise ValueError(f"{path}: held by another writer; wait for it") from error
            raise

    def release(self) -> None:
        """Let the next writer in."""
        os.close(self.handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
