"""Batches of tasks of different lengths: rows of all tasks one after the other, padded only where a kernel asks."""

from dataclasses import dataclass

import numpy as np
import torch
from core_tensor.checks import check_tensor
from torch import Tensor

from meta_embed.tasks.encode import Array
from meta_embed.tasks.events import Events, ranges


@dataclass(frozen=True)
class Ragged:
    """Rows of T tasks.

    Attributes:
        ids: Categories, shape (R, k), int64.
        dense: Numbers, shape (R, p).
        y: Labels, shape (R,).
        w: Weights, shape (R,).
        lengths: Rows of every task, shape (T,), int64, R in all.
    """

    ids: Tensor
    dense: Tensor
    y: Tensor
    w: Tensor
    lengths: Tensor

    @property
    def owner(self) -> Tensor:
        """Task of every row, shape (R,)."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)

    def to(self, device: torch.device | str) -> "Ragged":
        """Move to a device."""
        return Ragged(*(t.to(device) for t in (self.ids, self.dense, self.y, self.w, self.lengths)))


@dataclass(frozen=True)
class TaskBatch:
    """T tasks: members, what is known of them, and what is asked.

    Attributes:
        member_ids: Categories of the members, shape (T, k'), int64.
        member_dense: Numbers of the members, shape (T, p').
        support: Events that have happened.
        query: Events to predict.
    """

    member_ids: Tensor
    member_dense: Tensor
    support: Ragged
    query: Ragged

    def __len__(self) -> int:
        return len(self.support.lengths)

    def to(self, device: torch.device | str) -> "TaskBatch":
        """Move to a device."""
        members = (self.member_ids.to(device), self.member_dense.to(device))
        return TaskBatch(*members, self.support.to(device), self.query.to(device))


def check_lengths(lengths: Tensor, rows: int) -> None:
    """Refuse lengths that do not divide the rows among the tasks.

    Args:
        lengths: Rows of every task, shape (T,), int64.
        rows: Rows of all tasks.

    Raises:
        TypeError: If it is no tensor of int64.
        ValueError: If a length is negative, or they do not sum to the rows.
    """
    check_tensor("lengths", lengths, ndim=1, dtype=torch.int64)
    if len(lengths) and int(lengths.min()) < 0:
        raise ValueError(f"lengths: expected at least 0, got {int(lengths.min())}")
    if int(lengths.sum()) != rows:
        raise ValueError(f"lengths: expected them to sum to the {rows} rows of the supports, got {int(lengths.sum())}")


def pad(rows: Tensor, lengths: Tensor) -> Tensor:
    """Rows of all tasks as one padded tensor.

    Args:
        rows: Shape (R, ...).
        lengths: Rows of every task, shape (T,), R in all.

    Returns:
        Shape (T, longest, ...), zeros behind each length.
    """
    tasks, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
    if len(rows) == tasks * longest:  # all of one length
        return rows.reshape(tasks, longest, *rows.shape[1:])
    inside = torch.arange(longest, device=rows.device) < lengths[:, None]  # (T, longest)
    out = rows.new_zeros(tasks, longest, *rows.shape[1:])
    return out.index_put((inside,), rows) if rows.requires_grad else _filled(out, inside, rows)


def _filled(out: Tensor, inside: Tensor, rows: Tensor) -> Tensor:
    out[inside] = rows
    return out


def gather(events: Events, starts: Array, counts: Array) -> Ragged:
    """Rows of tasks that are slices of the log.

    Args:
        events: The log.
        starts: First row of every task, shape (T,).
        counts: Rows of every task, shape (T,).

    Returns:
        The rows.
    """
    index = ranges(starts, counts)
    ids, dense, y, w = (torch.from_numpy(a[index]) for a in (events.ids, events.dense, events.y, events.w))
    return Ragged(ids, dense, y, w, torch.from_numpy(np.asarray(counts, np.int64)))


def task_batch(events: Events, members: Array, support: tuple[Array, Array], query: tuple[Array, Array]) -> TaskBatch:
    """Tasks of some members.

    Args:
        events: The log.
        members: Positions, shape (T,).
        support: First rows and numbers of rows.
        query: First rows and numbers of rows.

    Returns:
        The batch.
    """
    ids, dense = torch.from_numpy(events.member_ids[members]), torch.from_numpy(events.member_dense[members])
    return TaskBatch(ids, dense, gather(events, *support), gather(events, *query))
