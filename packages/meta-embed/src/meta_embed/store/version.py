"""The handshake: vectors are scored by the global block they were made with."""

from dataclasses import dataclass

import numpy as np

from meta_embed.store.base import Store
from meta_embed.store.codec import StoreInfo, decode_records

_AT_ONCE = 10_000


def check_version(info: StoreInfo, version: str, where: str, *, allow_stale: bool = False) -> None:
    """Refuse vectors of another model.

    Args:
        info: What the store says about itself.
        version: Version of the global block.
        where: Name of the store, for the message.
        allow_stale: Whether another version is accepted.

    Raises:
        ValueError: If versions differ.
    """
    if info.version != version and not allow_stale:
        raise ValueError(
            f"{where}: holds vectors of model version {info.version}, but the global block is {version};"
            " generate anew, or allow stale vectors"
        )


@dataclass(frozen=True)
class Freshness:
    """How old the vectors of a store are.

    Attributes:
        members: Number of members.
        stale: Those whose newest event is older than the limit.
        oldest: Age of the oldest vector's newest event, seconds.
        median: Median age, seconds.
    """

    members: int
    stale: int
    oldest: float
    median: float


def freshness(store: Store, now: float, ttl: float) -> Freshness:
    """Ages of all vectors.

    Args:
        store: The store.
        now: Time to measure from, seconds.
        ttl: Age beyond which a vector is stale, seconds.

    Returns:
        The report.
    """
    ages: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []
    values: list[bytes] = []

    def drain() -> None:
        try:
            ages.append(now - decode_records(values, store.info).times)
        except ValueError as error:
            raise ValueError(f"{store.where}: {error}") from error
        values.clear()

    for _, value, _ in store.items():
        values.append(value)
        if len(values) == _AT_ONCE:
            drain()
    drain()
    age = np.concatenate(ages)
    if not len(age):
        return Freshness(0, 0, 0.0, 0.0)
    return Freshness(len(age), int((age > ttl).sum()), float(age.max()), float(np.median(age)))
