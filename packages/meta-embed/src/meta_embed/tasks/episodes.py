"""Training tasks: every member's history cut at a random point, some at its very beginning."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import msgspec
import numpy as np
import torch

from meta_embed.tasks.encode import Array
from meta_embed.tasks.events import Events
from meta_embed.tasks.ragged import TaskBatch, task_batch
from meta_embed.tasks.split import Split, known_before

_POWERS = {"events": 1.0, "sqrt": 0.5, "tasks": 0.0}


class EpisodeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How histories are cut.

    Attributes:
        tasks: Tasks of a batch, over all processes.
        support: Events of a support at most, the latest before the cut.
        query: Events of a query at most, the first behind the cut.
        cold: Share of tasks without a support, so that the unadapted vector is trained as the cold start.
        weighting: What a task with a query of n events counts in the outer loss: `events`, n; `sqrt`, its square root;
            `tasks`, one.
    """

    tasks: int = 64
    support: int = 32
    query: int = 40
    cold: float = 0.2
    weighting: Literal["events", "sqrt", "tasks"] = "events"

    def __post_init__(self) -> None:
        """Refuse settings that make no task."""
        if self.tasks < 1 or self.support < 0 or self.query < 1 or not 0 <= self.cold <= 1:
            raise ValueError("episodes: expected tasks >= 1, support >= 0, query >= 1 and cold in [0, 1]")


def draw(events: Events, members: Array, options: EpisodeOptions, rng: np.random.Generator) -> Split:
    """One task for each member: a cut that leaves at least one event behind it, at small histories as often as large.

    Args:
        events: The log.
        members: Positions.
        options: How to cut.
        rng: Source of chance.

    Returns:
        The tasks of members with at least one event.
    """
    members = members[events.counts[members] > 0]
    counts = events.counts[members]
    longest = np.minimum(counts - 1, options.support)
    # log-uniform on 1 .. longest: activity is spread over orders of magnitude
    size = np.floor(np.exp(rng.random(len(members)) * np.log(longest + 1.0))).astype(np.int64)
    size = np.where((rng.random(len(members)) < options.cold) | (longest < 1), 0, np.minimum(size, longest))
    begin = events.offsets[:-1][members]
    # the cut is where a history of this size ends; a full support may end anywhere later
    slack = np.where(size == options.support, counts - 1 - size, 0)
    shift = np.floor(rng.random(len(members)) * (slack + 1)).astype(np.int64)
    cut = begin + size + shift
    query = np.minimum(begin + counts - cut, options.query)
    return known_before(events, Split(members, cut - size, size, cut, query))


def epoch(
    events: Events, options: EpisodeOptions, rng: np.random.Generator, rank: int = 0, size: int = 1
) -> Iterator[tuple[TaskBatch, float]]:
    """Batches of one pass over all members; every process draws the same tasks and keeps its share of each batch.

    Args:
        events: The log.
        options: How to cut.
        rng: Source of chance, equal on all processes.
        rank: This process.
        size: Number of processes.

    Yields:
        This process's tasks of the next batch, and what all processes' tasks count together.
    """
    order = rng.permutation(len(events))
    for first in range(0, len(order), options.tasks):
        split = draw(events, order[first : first + options.tasks], options, rng)
        total = len(split.members)
        if total == 0:
            continue
        ends = np.concatenate([[0], events.w.cumsum(dtype=np.float64)])
        asked = ends[split.query_start + split.query] - ends[split.query_start]  # (T,)
        counted = np.where(asked > 0, asked ** _POWERS[options.weighting], 0.0)
        if not counted.sum() > 0:  # nothing to learn from
            continue
        own = slice(total * rank // size, total * (rank + 1) // size)
        batch = task_batch(
            events,
            split.members[own],
            (split.support_start[own], split.support[own]),
            (split.query_start[own], split.query[own]),
        )
        if options.weighting != "events":
            scale = np.divide(counted, asked, out=np.zeros(total), where=asked > 0)[own]
            by_row = np.repeat(scale, split.query[own]).astype(np.float32)
            batch = replace(batch, query=replace(batch.query, w=batch.query.w * torch.from_numpy(by_row)))
        yield batch, float(counted.sum())
