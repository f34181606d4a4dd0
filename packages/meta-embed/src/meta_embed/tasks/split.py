"""Splits in time: what was known of a member before what is asked of it, never the other way."""

from dataclasses import dataclass

import numpy as np

from meta_embed.tasks.encode import Array
from meta_embed.tasks.events import Events


@dataclass(frozen=True, eq=False)
class Split:
    """Tasks as slices of a log. Hashed by identity.

    Attributes:
        members: Position of each task's member, shape (T,).
        support_start: First row of the support, shape (T,).
        support: Rows of the support, shape (T,).
        query_start: First row of the query, shape (T,).
        query: Rows of the query, shape (T,).
    """

    members: Array
    support_start: Array
    support: Array
    query_start: Array
    query: Array


def split_at(events: Events, support: int, query: int, start: int | None = None, members: Array | None = None) -> Split:
    """One task per member: its first events as support, later ones as query.

    Every support size gets the same query, so that its figures can be compared. A support event whose label was known
    only after the first event of the query is left out, with all that follow it.

    Args:
        events: The log.
        support: Events of the support at most.
        query: Events of the query at most.
        start: Position of the query's first event in the member's history; None: directly behind the support.
        members: Positions of the members; None for all.

    Returns:
        The tasks of those members who have a query.

    Raises:
        ValueError: If the support would reach behind the start of the query, or no member has a query.
    """
    first = support if start is None else start
    if support < 0 or query < 1 or first < support:
        raise ValueError(f"support: expected 0 <= support <= start of the query, got {support} and {first}")
    chosen = np.arange(len(events)) if members is None else members
    counts = events.counts[chosen]
    chosen = chosen[counts > first]
    if not len(chosen):
        raise ValueError(f"query: empty, because no member has more than {first} events")
    begin, counts = events.offsets[:-1][chosen], events.counts[chosen]
    rows = np.full(len(chosen), support, np.int64)
    found = Split(chosen, begin, rows, begin + first, np.minimum(counts - first, query))
    return known_before(events, found)


def known_before(events: Events, split: Split) -> Split:
    """Shorten supports to the events whose labels were known when the query began.

    Args:
        events: The log.
        split: Tasks.

    Returns:
        The same tasks; a support ends before its first label that came too late.
    """
    asked = events.time[split.query_start]
    late = np.zeros(len(events.time) + 1, np.int64)
    lengths = split.support.copy()
    if (events.known > events.time).any():
        for t in range(len(lengths)):
            rows = slice(split.support_start[t], split.support_start[t] + split.support[t])
            too_late = np.flatnonzero(events.known[rows] > asked[t])
            lengths[t] = too_late[0] if len(too_late) else lengths[t]
    del late
    checked = Split(split.members, split.support_start, lengths, split.query_start, split.query)
    check_split(events, checked)
    return checked


def check_split(events: Events, split: Split) -> None:
    """Refuse tasks in which a support holds what came after the start of its query.

    Args:
        events: The log.
        split: Tasks.

    Raises:
        ValueError: If a query is empty, a slice leaves its member, or a support comes after its query in time.
    """
    if (split.query < 1).any():
        raise ValueError("query: expected at least one event in every task, got an empty one")
    begin, end = events.offsets[:-1][split.members], events.offsets[1:][split.members]
    inside = (split.support_start >= begin) & (split.support_start + split.support <= end)
    inside &= (split.query_start >= begin) & (split.query_start + split.query <= end) & (split.support >= 0)
    if not inside.all():
        raise ValueError("split: expected slices within the events of their member")
    some = split.support > 0
    last = (split.support_start + split.support - 1)[some]
    # rows are sorted in time, so the last of the support is its latest
    if (split.support_start + split.support > split.query_start)[some].any() or (
        events.time[last] > events.time[split.query_start[some]]
    ).any():
        raise ValueError("support: expected events before those of the query, got one after it in time")


def by_key(keys: Array, shares: tuple[float, ...], seed: int) -> list[Array]:
    """Split entities at random, each by its own key, so that a longer log moves nobody to another part.

    Args:
        keys: Entity keys.
        shares: Shares of the parts; the rest is one more part.
        seed: Seed.

    Returns:
        Positions of each part, ascending: one more part than shares.
    """
    import hashlib

    draws = (
        np.asarray(
            [
                int.from_bytes(hashlib.blake2b(f"{seed}:{k}".encode(), digest_size=8).digest(), "little")
                for k in keys.tolist()
            ]
        )
        / 2.0**64
    )
    part = np.searchsorted(np.cumsum(shares), draws, side="right")
    return [np.flatnonzero(part == i) for i in range(len(shares) + 1)]
