"""The interface that every store has."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import Any, Self

import msgspec

from meta_embed.store.codec import Key, Records, StoreInfo, decode_key, decode_records, encode_key, encode_records

Item = tuple[bytes, bytes, bytes]
"""Key, record and history of one member."""


class Store(ABC):
    """Vectors of members by key. Backends move bytes; this class gives them their meaning.

    Args:
        where: Name of the store in messages.
        info: What the store says about itself.
    """

    def __init__(self, where: str, info: StoreInfo) -> None:
        self.where, self.info = where, info

    @abstractmethod
    def fetch(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The record of every key, None where there is none.

        Args:
            keys: Keys as `encode_key` makes them.

        Returns:
            One entry per key, in order.
        """

    @abstractmethod
    def fetch_history(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The history of every key, None where there is none.

        Args:
            keys: Keys as `encode_key` makes them.

        Returns:
            One entry per key, in order.
        """

    @abstractmethod
    def upsert(self, items: Iterable[Item], info: StoreInfo) -> None:
        """Write records in one transaction: all of them or none.

        Args:
            items: Key, record and history of each member; an empty history leaves the one that is there.
            info: What the store says about itself from then on.
        """

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """Every member, in the order of the keys.

        Returns:
            Key, record and history of each.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of members."""

    @abstractmethod
    def replaced(self) -> bool:
        """Whether another store has taken this one's place since it was opened; updates do not count.

        Returns:
            If so, open it again.
        """

    @abstractmethod
    def close(self) -> None:
        """Release files, connections and the writer's lock."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def keys_of(self, keys: Iterable[Any]) -> list[bytes]:
        """Bytes of keys, of the store's kind.

        Args:
            keys: Integers or strings.

        Returns:
            The bytes.
        """
        return [encode_key(key, self.info.key) for key in keys]

    def get(self, keys: Sequence[Key]) -> tuple[list[bool], Records]:
        """Records of the members that the store knows.

        Args:
            keys: Entity keys.

        Returns:
            Whether each key was found, and the records of those that were, in order.

        Raises:
            TypeError: If a key is of the other kind.
            ValueError: If a record is corrupt.
        """
        values = self.fetch(self.keys_of(keys))
        try:
            return [v is not None for v in values], decode_records([v for v in values if v is not None], self.info)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    def put(self, keys: Sequence[Key], records: Records, histories: Sequence[bytes] | None = None) -> None:
        """Write records of some members.

        Args:
            keys: Entity keys.
            records: Their records.
            histories: Their histories, if the store keeps any.

        Raises:
            ValueError: If the vectors have another width than the store's.
        """
        if records.vectors.shape[1] != self.info.width:
            raise ValueError(
                f"{self.where}: holds vectors of width {self.info.width}, got width {records.vectors.shape[1]}"
            )
        kept = histories if histories is not None else [b""] * len(keys)
        self.upsert(zip(self.keys_of(keys), encode_records(records, self.info), kept, strict=True), self.info)

    def members(self) -> Iterator[tuple[Key, bytes]]:
        """Every member's key and record.

        Returns:
            Pairs, in the order of the keys.

        Raises:
            ValueError: If a key is corrupt.
        """
        for key, value, _ in self.items():
            try:
                decoded = decode_key(key, self.info.key)
            except ValueError as error:
                raise ValueError(f"{self.where}: corrupt key ({error})") from error
            yield decoded, value


def pack_info(info: StoreInfo) -> bytes:
    """What a store says about itself, as JSON."""
    return msgspec.json.encode(info)


def unpack_info(raw: bytes | None, where: str) -> StoreInfo:
    """Read what `pack_info` wrote.

    Args:
        raw: JSON, or None where there is none.
        where: Name of the store, for the message.

    Returns:
        The description.

    Raises:
        ValueError: If it is absent or broken.
    """
    if raw is None:
        raise ValueError(f"{where}: expected a store of meta-embed, found no description in it")
    try:
        return msgspec.json.decode(raw, type=StoreInfo)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: expected a store of meta-embed ({error})") from error


def ascending(items: Iterable[Item]) -> Iterator[Item]:
    """Pass items on, and refuse a key that comes twice or out of order.

    Args:
        items: Members in the order of their keys.

    Yields:
        The same items.

    Raises:
        ValueError: If a key is not above the one before it.
    """
    last: bytes | None = None
    for item in items:
        if last is not None and item[0] <= last:
            what = "comes twice" if item[0] == last else "comes after a larger one"
            raise ValueError(f"entity: the key {item[0]!r} {what}")
        last = item[0]
        yield item


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items in lists.

    Args:
        items: Any items.
        size: Items of a list at most.

    Yields:
        Lists; none is empty.
    """
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
