"""The latest events of a member as bytes, kept beside its vector so that a refresh needs the new events only."""

from dataclasses import replace
from typing import Any

import numpy as np

from meta_embed.tasks.events import Events, Keys
from meta_embed.tasks.schema import Schema


def row_layout(schema: Schema) -> np.dtype[Any]:
    """One event.

    Args:
        schema: Its columns.

    Returns:
        A packed layout.
    """
    ids, dense = sum(f.kind == "id" for f in schema.row), sum(f.width for f in schema.dense_row)
    return np.dtype(
        [("time", "<f8"), ("known", "<f8"), ("event", "<u8"), ("y", "<f4"), ("w", "<f4"),
         ("ids", "<i8", (ids,)), ("dense", "<f4", (dense,))]
    )  # fmt: skip


def member_layout(schema: Schema) -> np.dtype[Any]:
    """A member's features, which precede its events."""
    ids = sum(f.kind == "id" for f in schema.member)
    dense = sum(f.width for f in schema.member if f.kind == "dense")
    return np.dtype([("ids", "<i8", (ids,)), ("dense", "<f4", (dense,))])


def pack(events: Events, schema: Schema) -> list[bytes]:
    """The history of every member.

    Args:
        events: Their events.
        schema: Their columns.

    Returns:
        One value per member.
    """
    rows, members = np.zeros(len(events.time), row_layout(schema)), np.zeros(len(events), member_layout(schema))
    for name in ("time", "known", "event", "y", "w", "ids", "dense"):
        rows[name] = getattr(events, name)
    members["ids"], members["dense"] = events.member_ids, events.member_dense
    body, head = rows.tobytes(), members.tobytes()
    size, width = rows.dtype.itemsize, members.dtype.itemsize
    cuts = (events.offsets * size).tolist()
    return [head[width * i : width * (i + 1)] + body[cuts[i] : cuts[i + 1]] for i in range(len(events))]


def unpack(keys: Keys, histories: list[bytes], schema: Schema) -> Events:
    """The events that `pack` wrote.

    Args:
        keys: Members, ascending.
        histories: One value per member.
        schema: Their columns.

    Returns:
        The log.

    Raises:
        ValueError: If a history has no whole number of events.
    """
    layout, head = row_layout(schema), member_layout(schema)
    width, size = head.itemsize, layout.itemsize
    if any(len(h) < width or (len(h) - width) % size for h in histories):
        raise ValueError(f"corrupt history: expected {width} bytes and a whole number of events of {size} bytes")
    rows = np.frombuffer(b"".join(h[width:] for h in histories), layout)
    members = np.zeros(len(histories), head)
    if width:
        members = np.frombuffer(b"".join(h[:width] for h in histories), head)
    counts = np.asarray([(len(h) - width) // size for h in histories], np.int64)
    by_row = {name: rows[name].copy() for name in ("time", "known", "event", "y", "w", "ids", "dense")}
    return Events(
        keys=keys,
        offsets=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
        member_ids=members["ids"].copy(),
        member_dense=members["dense"].copy(),
        **by_row,
    )


def merge(old: Events, new: Events, most: int) -> Events:
    """Histories of the same members joined: what comes twice counts once, the latest events stay.

    The latest of the union are the latest of the old latest and the new ones, so refreshing is regenerating.

    Args:
        old: Histories, of all members of `new` in the same order; a member that is new has no event in it.
        new: New events.
        most: Events kept of every member.

    Returns:
        The joined log. Features of a member that had a history are those of that history.
    """
    owner = np.concatenate([np.repeat(np.arange(len(e)), e.counts) for e in (old, new)])
    joined = {
        name: np.concatenate([getattr(old, name), getattr(new, name)])
        for name in ("time", "known", "event", "y", "w", "ids", "dense")
    }
    # a stable order puts the old one of two equal events first
    order = np.lexsort((joined["event"], joined["time"], owner))
    by_event = np.lexsort((np.arange(len(owner)), joined["event"], owner))
    same = (owner[by_event][1:] == owner[by_event][:-1]) & (
        joined["event"][by_event][1:] == joined["event"][by_event][:-1]
    )
    again = np.zeros(len(owner), bool)
    again[by_event[1:]] = same
    order = order[~again[order]]
    counts = np.bincount(owner[order], minlength=len(new))
    had = old.counts > 0
    log = replace(
        new,
        offsets=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
        member_ids=np.where(had[:, None], old.member_ids, new.member_ids),
        member_dense=np.where(had[:, None], old.member_dense, new.member_dense),
        **{name: values[order] for name, values in joined.items()},
    )
    return log.latest(most)


def until(events: Events, as_of: float) -> Events:
    """The events that had happened, and whose labels were known, at some time.

    Args:
        events: The log.
        as_of: Seconds.

    Returns:
        The log of the members who had one.
    """
    owner = np.repeat(np.arange(len(events)), events.counts)
    keep = np.flatnonzero((events.time <= as_of) & (events.known <= as_of))
    if len(keep) == len(owner):
        return events
    counts = np.bincount(owner[keep], minlength=len(events))
    by_row = {name: getattr(events, name)[keep] for name in ("time", "known", "event", "y", "w", "ids", "dense")}
    log = replace(events, offsets=np.concatenate([[0], counts.cumsum()]).astype(np.int64), **by_row)
    return log.choose(np.flatnonzero(counts > 0))
