"""A Redis server: vectors shared by many machines. Keys are `<prefix>v:<key>`, `<prefix>h:<key>`, `<prefix>about`."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit, urlunsplit

from core_tensor.app.extras import require

from meta_embed.store.base import Item, Store, pack_info, unpack_info
from meta_embed.store.codec import StoreInfo

T = TypeVar("T")
_LOCK_MS = 600_000
_BATCH = 5_000
_RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) else return 0 end"


class RedisStore(Store):
    """See `Store`.

    Args:
        uri: `redis://host:port/db?prefix=name:`.
        writer: Whether to write; one process at a time, by a lock that expires ten minutes after its last write.

    Raises:
        ValueError: If the server holds no such store, cannot be reached, or another writer holds the lock.
    """

    def __init__(self, uri: str, *, writer: bool = False) -> None:
        self.client, self.prefix = connect(uri)
        self.where = uri
        self.token: bytes | None = None
        if writer:
            self._lock()
        try:
            raw = self._ask(lambda: self.client.get(self.prefix + b"about"))
            super().__init__(uri, unpack_info(raw, uri))
        except BaseException:
            self.close()
            raise

    def _ask(self, what: Callable[[], T]) -> T:
        return asking(self.where, what)

    def _lock(self) -> None:
        token = os.urandom(16)
        name = self.prefix + b"writer"
        if not self._ask(lambda: self.client.set(name, token, nx=True, px=_LOCK_MS)):
            raise ValueError(f"{self.where}: held by another writer; wait for it")
        self.token = token

    def fetch(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        return self._many(b"v:", keys)

    def fetch_history(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        return self._many(b"h:", keys)

    def _many(self, kind: bytes, keys: Sequence[bytes]) -> list[bytes | None]:
        if not keys:
            return []
        found: list[bytes | None] = self._ask(lambda: self.client.mget([self.prefix + kind + key for key in keys]))
        return found

    def upsert(self, items: Iterable[Item], info: StoreInfo) -> None:
        """See `Store`."""

        def write() -> None:
            with self.client.pipeline(transaction=True) as pipe:
                for key, value, history in items:
                    pipe.set(self.prefix + b"v:" + key, value)
                    if history:
                        pipe.set(self.prefix + b"h:" + key, history)
                pipe.set(self.prefix + b"about", pack_info(info))
                if self.token is not None:
                    pipe.pexpire(self.prefix + b"writer", _LOCK_MS)
                pipe.execute()

        self._ask(write)
        self.info = info

    def items(self) -> Iterator[Item]:
        """See `Store`."""
        keys = self._keys()
        for first in range(0, len(keys), _BATCH):
            part = keys[first : first + _BATCH]
            for key, value, history in zip(part, self.fetch(part), self.fetch_history(part), strict=True):
                yield key, value or b"", history or b""

    def _keys(self) -> list[bytes]:
        start = len(self.prefix) + 2
        pattern = escape(self.prefix) + b"v:*"
        return sorted({name[start:] for name in self._ask(lambda: list(self.client.scan_iter(pattern, count=1000)))})

    def __len__(self) -> int:
        return len(self._keys())

    def close(self) -> None:
        """See `Store`."""
        if self.token is not None:
            with contextlib.suppress(ValueError):  # a lock that cannot be given back expires
                self._ask(lambda: self.client.eval(_RELEASE, 1, self.prefix + b"writer", self.token))
            self.token = None
        self.client.close()


def escape(prefix: bytes) -> bytes:
    """A prefix as Redis patterns want it."""
    return b"".join(b"\\" + bytes([c]) if c in b"*?[]\\^" else bytes([c]) for c in prefix)


def connect(uri: str) -> tuple[Any, bytes]:
    """Client and key prefix of a store's address."""
    redis = require("redis", "meta-embed[redis]")
    parts = urlsplit(uri)
    options = parse_qs(parts.query)
    unknown = set(options) - {"prefix"}
    if unknown:
        raise ValueError(f"{uri}: expected the option prefix, got {', '.join(sorted(unknown))}")
    prefix = options.get("prefix", ["meta-embed:"])[0].encode()
    plain = urlunsplit(parts._replace(query=""))
    return redis.Redis.from_url(plain, socket_timeout=10, socket_connect_timeout=5), prefix


def asking(where: str, what: Callable[[], T]) -> T:
    """Ask the server; what goes wrong there names the store."""
    redis = require("redis", "meta-embed[redis]")
    try:
        return what()
    except redis.RedisError as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error


def create_redis(uri: str, info: StoreInfo, items: Iterable[Item]) -> None:
    """Write a complete store, in place of one that may be there.

    The description is written last, and the old one removed first: a reader that comes in between finds no store.

    Args:
        uri: See `RedisStore`.
        info: What it says about itself.
        items: Every member.

    Raises:
        ValueError: If the server cannot be reached, or another writer holds the lock.
    """
    client, prefix = connect(uri)
    try:
        token = os.urandom(16)
        if not asking(uri, lambda: client.set(prefix + b"writer", token, nx=True, px=_LOCK_MS)):
            raise ValueError(f"{uri}: held by another writer; wait for it")
        try:
            asking(uri, lambda: _fill(client, prefix, info, items))
        finally:
            asking(uri, lambda: client.eval(_RELEASE, 1, prefix + b"writer", token))
    finally:
        client.close()


def _fill(client: Any, prefix: bytes, info: StoreInfo, items: Iterable[Item]) -> None:
    client.delete(prefix + b"about")
    for kind in (b"v:", b"h:"):
        old = list(client.scan_iter(escape(prefix) + kind + b"*", count=1000))
        for first in range(0, len(old), _BATCH):
            client.delete(*old[first : first + _BATCH])
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            _send(client, prefix, batch)
            batch = []
    _send(client, prefix, batch)
    client.set(prefix + b"about", pack_info(info))


def _send(client: Any, prefix: bytes, batch: list[Item]) -> None:
    with client.pipeline(transaction=False) as pipe:
        for key, value, history in batch:
            pipe.set(prefix + b"v:" + key, value)
            if history:
                pipe.set(prefix + b"h:" + key, history)
        pipe.pexpire(prefix + b"writer", _LOCK_MS)
        pipe.execute()
