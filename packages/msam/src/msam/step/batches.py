"""Batches as trees of tensors whose first dimension counts examples, and how they are cut into micro-batches."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from msam.step.options import check_micro_batches


def tree_map(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Apply a function to every tensor of a batch; anything that is no tensor or container passes through.

    Args:
        function: Tensor to tensor.
        batch: Tensor, or nested tuples, lists and mappings of tensors.

    Returns:
        The same structure.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, tuple | list):
        parts = [tree_map(function, value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, Mapping):
        items = {key: tree_map(function, value) for key, value in batch.items()}
        return items if type(batch) is dict else type(batch)(items)  # type: ignore[call-arg]  # BatchEncoding and kin
    return batch


def batch_size(batch: Any) -> int:
    """Number of examples of a batch: the common first dimension of its tensors (those without dimensions pass).

    Args:
        batch: Tensor, or nested tuples, lists and mappings of tensors.

    Returns:
        The size, at least 1.

    Raises:
        ValueError: If there is no tensor, the sizes differ, or the batch is empty.
    """
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.ndim:
            sizes.append(tensor.shape[0])
        return tensor

    tree_map(note, batch)
    if not sizes or len(set(sizes)) != 1 or sizes[0] == 0:
        raise ValueError(f"batch: expected tensors of one common first dimension >= 1, got first dimensions {sizes}")
    return sizes[0]


@dataclass(frozen=True)
class Shards:
    """How B examples are cut into m consecutive micro-batches.

    Attributes:
        sizes: Examples of each micro-batch.
        counts: Micro-batches of each stretch, where stretches are cut finer than the sizes ask.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...] | None = None

    @cached_property
    def count(self) -> int:
        """Number m of micro-batches."""
        return len(self.sizes)

    @cached_property
    def total(self) -> int:
        """Number B of examples."""
        return sum(self.sizes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First example of each micro-batch."""
        return tuple(sum(self.sizes[:j]) for j in range(self.count))

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Stretches of equal micro-batches, each as (first micro-batch, number of them, size)."""
        if self.counts is not None:
            firsts = itertools.accumulate(self.counts[:-1], initial=0)
            return tuple((first, n, self.sizes[first]) for first, n in zip(firsts, self.counts, strict=True))
        found: list[tuple[int, int, int]] = []
        for j, size in enumerate(self.sizes):
            if found and found[-1][2] == size:
                found[-1] = (found[-1][0], found[-1][1] + 1, size)
            else:
                found.append((j, 1, size))
        return tuple(found)

    def stretches(self, each: int) -> tuple[tuple[int, int, int, int], ...]:
        """The runs as rows of a dimension that counts examples.

        Args:
            each: Consecutive rows that an example owns.

        Returns:
            First and last row (exclusive), first micro-batch and number of micro-batches of each run.
        """
        return tuple(
            (self.starts[first] * each, (self.starts[first] + count * size) * each, first, count)
            for first, count, size in self.runs
        )

    def parts(self, batch: Any) -> list[Any]:
        """The micro-batches of a batch.

        Args:
            batch: Tree of tensors, examples first.

        Returns:
            Trees of the same structure, as views; the batch itself if it is the only one.
        """
        if self.count == 1:
            return [batch]
        return [narrow(batch, start, size) for start, size in zip(self.starts, self.sizes, strict=True)]

    def halved(self) -> "Shards":
        """The first half (rounded up) of each micro-batch.

        Returns:
            The halves, in the same stretches, although 3 and 4 examples have halves of one size.
        """
        return Shards(tuple(-(-size // 2) for size in self.sizes), tuple(count for _, count, _ in self.runs))

    def half_index(self, device: torch.device | None = None) -> Tensor:
        """Indices of the examples that `halved` keeps.

        Args:
            device: Where the indices live.

        Returns:
            Indices, shape (sum of the halves,), int64.
        """
        halves = zip(self.starts, self.halved().sizes, strict=True)
        return torch.cat([torch.arange(start, start + half, device=device) for start, half in halves])


@lru_cache(maxsize=64)
def cut(size: int, num_micro_batches: int | None = None, micro_batch_size: int | None = None) -> Shards:
    """Sizes of the micro-batches of a batch; exactly one of the two arguments is given.

    Args:
        size: Examples B of the batch.
        num_micro_batches: Number m of micro-batches; the first B mod m of them hold one example more.
        micro_batch_size: Examples per micro-batch; the last one holds the rest.

    Returns:
        The shards.

    Raises:
        ValueError: If the batch has fewer examples than micro-batches, or than one micro-batch holds.
    """
    check_micro_batches(num_micro_batches, micro_batch_size)
    if num_micro_batches is not None:
        if num_micro_batches > size:
            raise ValueError(
                f"num_micro_batches: expected at most the {size} examples of the batch, got {num_micro_batches}"
            )
        base, more = divmod(size, num_micro_batches)
        return Shards((base + 1,) * more + (base,) * (num_micro_batches - more))
    assert micro_batch_size is not None
    if micro_batch_size > size:
        raise ValueError(f"micro_batch_size: expected at most the {size} examples of the batch, got {micro_batch_size}")
    whole, rest = divmod(size, micro_batch_size)
    return Shards((micro_batch_size,) * whole + ((rest,) if rest else ()))


def narrow(batch: Any, start: int, length: int) -> Any:
    """Consecutive examples of a batch, as views.

    Args:
        batch: Tree of tensors.
        start: First example.
        length: Number of examples.

    Returns:
        The same structure.
    """
    return tree_map(lambda t: t.narrow(0, start, length) if t.ndim else t, batch)


def pick(batch: Any, index: Tensor) -> Any:
    """Examples of a batch by index.

    Args:
        batch: Tree of tensors.
        index: Indices of examples, shape (n,), int64.

    Returns:
        The same structure.
    """
    return tree_map(lambda t: t.index_select(0, index.to(t.device)) if t.ndim else t, batch)


def micro_batches(
    batch: Any, num_micro_batches: int | None = None, *, micro_batch_size: int | None = None
) -> Iterator[Any]:
    """The consecutive micro-batches of a batch, for loops around `MSAM.ascent` and `MSAM.descent`.

    Args:
        batch: Tensor, or nested tuples, lists and mappings of tensors, examples first.
        num_micro_batches: Number m of micro-batches.
        micro_batch_size: Examples per micro-batch (exactly one of the two is given).

    Yields:
        Micro-batches of the same structure, as views; the batch itself if it is the only one.
    """
    yield from cut(batch_size(batch), num_micro_batches, micro_batch_size).parts(batch)
