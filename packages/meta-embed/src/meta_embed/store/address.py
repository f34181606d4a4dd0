"""From an address to a store: a folder (LMDB), `sqlite:folder`, `parquet:folder`, or `redis://host:port/db?prefix=`."""

from collections.abc import Callable, Iterable
from pathlib import Path

from meta_embed.store.base import Item, Store
from meta_embed.store.codec import StoreInfo
from meta_embed.store.lmdb import LmdbStore, create_lmdb
from meta_embed.store.parquet import ParquetStore, create_parquet
from meta_embed.store.redis import RedisStore, create_redis
from meta_embed.store.sqlite import SqliteStore, create_sqlite

KINDS = ("lmdb", "sqlite", "parquet")


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
    if kind not in KINDS:
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

    classes: dict[str, type[Store]] = {"lmdb": LmdbStore, "sqlite": SqliteStore, "parquet": ParquetStore}
    open_file: Callable[..., Store] = classes[kind]
    return open_file(folder / f"store.{kind}", writer=writer)


def create_store(uri: str | Path, info: StoreInfo, items: Iterable[Item]) -> None:
    """Write a complete store, in place of one that may be there.

    Args:
        uri: Its address.
        info: What it says about itself.
        items: Every member, in the order of the keys.

    Raises:
        ValueError: If a key comes twice, or another writer holds the store.
    """
    kind, folder = parse(uri)
    if kind == "redis":
        create_redis(str(uri), info, items)
        return

    create = {"lmdb": create_lmdb, "sqlite": create_sqlite, "parquet": create_parquet}[kind]
    create(folder / f"store.{kind}", info, items)
