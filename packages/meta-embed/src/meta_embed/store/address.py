"""From an address to a store: a folder (LMDB), `sqlite:folder`, `parquet:folder`, or `redis://host:port/db?prefix=`."""

from collections.abc import Iterable
from pathlib import Path

from meta_embed.store.base import Item, Store, ascending
from meta_embed.store.codec import StoreInfo
from meta_embed.store.files import FileStore, check_free
from meta_embed.store.lmdb import LmdbStore
from meta_embed.store.parquet import ParquetStore
from meta_embed.store.redis import RedisStore, check_redis, create_redis
from meta_embed.store.sqlite import SqliteStore

FILES: dict[str, type[FileStore]] = {"lmdb": LmdbStore, "sqlite": SqliteStore, "parquet": ParquetStore}


def parse(uri: str | Path) -> tuple[str, Path]:
    """Kind of a store and its folder.

    Args:
        uri: An address.

    Returns:
        `lmdb`, `sqlite`, `parquet` or `redis`, and the folder (for Redis an empty path).

    Raises:
        ValueError: If the kind is unknown.
    """
    text = str(uri)
    if text.startswith(("redis://", "rediss://", "unix://")):
        return "redis", Path()
    kind, colon, rest = text.partition(":")
    if not colon or "/" in kind or "\\" in kind:
        return "lmdb", Path(text)
    if kind not in FILES:
        raise ValueError(f"{text}: expected a folder, sqlite:FOLDER, parquet:FOLDER or redis://..., got kind {kind}")
    return kind, Path(rest)


def open_store(uri: str | Path, *, writer: bool = False) -> Store:
    """Open a store.

    Args:
        uri: Its address.
        writer: Whether to write; one process at a time.

    Returns:
        The store.

    Raises:
        ValueError: If it is corrupt or foreign, or another writer holds it.
        FileNotFoundError: If there is none.
    """
    kind, folder = parse(uri)
    if kind == "redis":
        return RedisStore(str(uri), writer=writer)
    return FILES[kind](folder / f"store.{kind}", writer=writer)


def create_store(uri: str | Path, info: StoreInfo, items: Iterable[Item]) -> None:
    """Write a complete store, in place of one that may be there.

    Args:
        uri: Its address.
        info: What it says about itself.
        items: Every member, in the order of the keys.

    Raises:
        ValueError: If a key comes twice or out of order, or another writer holds the store.
    """
    kind, folder = parse(uri)
    if kind == "redis":
        create_redis(str(uri), info, ascending(items))
    else:
        FILES[kind].create(folder / f"store.{kind}", info, ascending(items))


def check_writable(uri: str | Path) -> None:
    """Refuse a store that another writer holds, before hours of work for it.

    Args:
        uri: Its address.

    Raises:
        ValueError: If one does, or a server cannot be reached.
    """
    kind, folder = parse(uri)
    if kind == "redis":
        check_redis(str(uri))
    else:
        check_free(folder / f"store.{kind}")
