"""A Redis server: vectors shared by many machines.

`<prefix>about` names the current generation and describes it; its members are `<prefix><generation>:v:<key>` and
`<prefix><generation>:h:<key>`. A new generation is written beside the old one and takes its place in one step, so a
reader never meets half of one, or vectors of two models.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit, urlunsplit

from core_tensor.app.extras import require

from meta_embed.store.base import Item, Store, batches, pack_info, unpack_info
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
        self.server = _Server(uri)
        self.lock = _Lock(self.server) if writer else None
        try:
            about = self.server.about()
            self.generation, description = _split(about)
            super().__init__(uri, unpack_info(description, uri))
            self.read = about
        except BaseException:
            self.close()
            raise

    def fetch(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        return self._many(b":v:", keys)

    def fetch_history(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Store`."""
        return self._many(b":h:", keys)

    def _many(self, kind: bytes, keys: Sequence[bytes]) -> list[bytes | None]:
        start = self.server.prefix + self.generation + kind
        names = [self.server.prefix + b"about", *(start + key for key in keys)]
        about, *found = self.server.ask(lambda client: client.mget(names))
        if about != self.read:  # refreshed, or generated anew
            generation, description = _split(about)
            if generation != self.generation:
                raise ValueError(f"{self.where}: was generated anew since it was opened; open it again")
            self.read, self.info = about, unpack_info(description, self.where)
        return list(found)

    def upsert(self, items: Iterable[Item], info: StoreInfo) -> None:
        """See `Store`."""
        if self.lock is None:
            raise ValueError(f"{self.where}: open for reading")
        about = self.generation + pack_info(info)

        def write(pipe: Any) -> None:
            self.server.put(pipe, self.generation, items)
            pipe.set(self.server.prefix + b"about", about)

        self.lock.holding(write)
        self.info, self.read = info, about

    def items(self) -> Iterator[Item]:
        """See `Store`."""
        keys = self._keys()
        for first in range(0, len(keys), _BATCH):
            part = keys[first : first + _BATCH]
            for key, value, history in zip(part, self.fetch(part), self.fetch_history(part), strict=True):
                yield key, value or b"", history or b""

    def _keys(self) -> list[bytes]:
        start = self.server.prefix + self.generation + b":v:"
        return sorted({name[len(start) :] for name in self.server.names(escape(start) + b"*")})

    def __len__(self) -> int:
        return len(self._keys())

    def replaced(self) -> bool:
        """See `Store`."""
        return _split(self.server.about())[0] != self.generation

    def close(self) -> None:
        """See `Store`."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None
        self.server.client.close()


class _Server:
    """The client, the prefix, and errors that name the store."""

    def __init__(self, uri: str) -> None:
        redis = require("redis", "meta-embed[redis]")
        parts = urlsplit(uri)
        options = parse_qs(parts.query)
        unknown = set(options) - {"prefix"}
        if unknown:
            raise ValueError(f"{uri}: expected the option prefix, got {', '.join(sorted(unknown))}")
        self.uri, self.errors = uri, redis.RedisError
        self.prefix = options.get("prefix", ["meta-embed:"])[0].encode()
        plain = urlunsplit(parts._replace(query=""))
        try:
            self.client = redis.Redis.from_url(plain, socket_timeout=10, socket_connect_timeout=5)
        except ValueError as error:
            raise ValueError(f"{uri}: {error}") from error

    def ask(self, what: Callable[[Any], T]) -> T:
        """Ask the server; what goes wrong there names the store."""
        try:
            return what(self.client)
        except self.errors as error:
            raise ValueError(f"{self.uri}: {' '.join(str(error).split())}") from error

    def about(self) -> bytes | None:
        """Generation and description."""
        found: bytes | None = self.ask(lambda client: client.get(self.prefix + b"about"))
        return found

    def names(self, pattern: bytes) -> list[bytes]:
        """All names of a pattern; the server may give one twice."""
        return self.ask(lambda client: list(client.scan_iter(pattern, count=1000)))

    def put(self, pipe: Any, generation: bytes, items: Iterable[Item]) -> None:
        """Queue members of a generation."""
        start = self.prefix + generation
        for key, value, history in items:
            pipe.set(start + b":v:" + key, value)
            if history:
                pipe.set(start + b":h:" + key, history)


class _Lock:
    """The lock of one writer, which a killed one holds until it expires.

    Raises:
        ValueError: If another writer holds it.
    """

    def __init__(self, server: _Server) -> None:
        self.server, self.token, self.name = server, os.urandom(16), server.prefix + b"writer"
        if not server.ask(lambda client: client.set(self.name, self.token, nx=True, px=_LOCK_MS)):
            server.client.close()
            raise ValueError(f"{server.uri}: held by another writer; wait for it")

    def holding(self, write: Callable[[Any], None]) -> None:
        """Write in one transaction that fails should the lock have expired, and renew the lock.

        Raises:
            ValueError: If the lock is no longer this writer's.
        """

        def attempt(client: Any) -> None:
            with client.pipeline(transaction=True) as pipe:
                pipe.watch(self.name)
                if pipe.get(self.name) != self.token:
                    raise ValueError(f"{self.server.uri}: the writer's lock expired; nothing was written")
                pipe.multi()
                write(pipe)
                pipe.pexpire(self.name, _LOCK_MS)
                pipe.execute()

        self.server.ask(attempt)

    def release(self) -> None:
        """Let the next writer in; a lock that cannot be given back expires."""
        with contextlib.suppress(ValueError):
            self.server.ask(lambda client: client.eval(_RELEASE, 1, self.name, self.token))


def _split(about: bytes | None) -> tuple[bytes, bytes | None]:
    """Generation (16 digits) and description."""
    return (b"", None) if about is None else (about[:16], about[16:])


def escape(prefix: bytes) -> bytes:
    """A prefix as Redis patterns want it."""
    return b"".join(b"\\" + bytes([c]) if c in b"*?[]\\^" else bytes([c]) for c in prefix)


def create_redis(uri: str, info: StoreInfo, items: Iterable[Item]) -> None:
    """Write a complete store; it takes the place of one that may be there when the last member is written.

    Args:
        uri: See `RedisStore`.
        info: What it says about itself.
        items: Every member, in the order of the keys.

    Raises:
        ValueError: If the server cannot be reached, or another writer holds the lock.
    """
    server = _Server(uri)
    lock = _Lock(server)
    generation = os.urandom(8).hex().encode()
    try:
        try:
            for batch in batches(items, _BATCH):
                lock.holding(lambda pipe, batch=batch: server.put(pipe, generation, batch))  # type: ignore[misc]
            lock.holding(lambda pipe: pipe.set(server.prefix + b"about", generation + pack_info(info)))
        finally:
            _sweep(server)  # the old generation, or what there is of one that failed, and those of killed writers
    finally:
        lock.release()
        server.client.close()


def _sweep(server: _Server) -> None:
    """Remove members of every generation but the current one."""
    current = server.prefix + _split(server.about())[0] + b":"
    names = server.names(escape(server.prefix) + b"?" * 16 + b":[vh]:*")
    old = [name for name in names if not name.startswith(current)]
    for first in range(0, len(old), _BATCH):
        part = old[first : first + _BATCH]
        server.ask(lambda client, part=part: client.unlink(*part))  # type: ignore[misc]


def check_redis(uri: str) -> None:
    """Refuse a server that cannot be reached, or a store that another writer holds.

    Args:
        uri: See `RedisStore`.

    Raises:
        ValueError: If so.
    """
    server = _Server(uri)
    try:
        if server.ask(lambda client: client.exists(server.prefix + b"writer")):
            raise ValueError(f"{uri}: held by another writer; wait for it")
    finally:
        server.client.close()
