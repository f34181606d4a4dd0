"""How old vectors may be: the same queries scored with vectors refreshed at different intervals."""

import numpy as np

from meta_embed.evaluate.buckets import model_scores
from meta_embed.evaluate.metrics import Scores
from meta_embed.model.personalizer import Personalizer
from meta_embed.tasks.encode import Array
from meta_embed.tasks.events import Events
from meta_embed.tasks.split import Split, known_before, split_at

CHUNK = 4096
"""Tasks that are scored at a time."""


def refreshed(events: Events, start: int, query: int, period: float, support: int) -> Split:
    """One task per asked event: its support is what a refresh every `period` seconds knew.

    Refreshes happen at the multiples of the period; one at the start of the query comes first, so that with an infinite
    period every event is asked of the vector made then.

    Args:
        events: The log.
        start: Position of the first asked event in a history.
        query: Asked events of a member at most.
        period: Seconds between refreshes; 0 refreshes before every event, infinity never.
        support: Events of a support at most, the latest before the refresh.

    Returns:
        The tasks, one query row each.
    """
    asked = split_at(events, 0, query, start=start)
    parts: list[tuple[Array, ...]] = []
    for member, first, count in zip(asked.members, asked.query_start, asked.query, strict=True):
        begin, times = events.offsets[member], events.time[events.offsets[member] : first + count]
        rows = np.arange(first, first + count)
        refresh = times[rows - begin]
        if period:
            refresh = np.floor(refresh / period) * period if np.isfinite(period) else np.full(count, -np.inf)
        refresh = np.maximum(refresh, times[start])
        known = np.clip(np.searchsorted(times, refresh, side="left"), start, rows - begin)
        length = np.minimum(known, support)
        parts.append((np.full(count, member), begin + known - length, length, rows))
    members, support_start, lengths, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    return known_before(events, Split(members, support_start, lengths, rows, np.ones_like(rows)))


def freshness_scores(
    model: Personalizer, events: Events, start: int, query: int, period: float, support: int
) -> Scores:
    """Scores of a model whose vectors are refreshed at an interval; every interval gives scores of the same rows.

    Args:
        model: The model.
        events: The log of the members who are asked.
        start: Position of the first asked event in a history.
        query: Asked events of a member at most.
        period: Seconds between refreshes; 0 refreshes before every event, infinity never.
        support: Events of a support at most.

    Returns:
        The scores.
    """
    split = refreshed(events, start, query, period, support)
    parts = [
        model_scores(model, events, Split(*(column[first : first + CHUNK] for column in vars(split).values())))
        for first in range(0, len(split.members), CHUNK)
    ]
    return Scores(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("logit", "y", "owner")))
