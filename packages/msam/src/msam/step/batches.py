"""Batches as trees of tensors whose first dimension counts examples, and how they are cut into micro-batches."""

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
    """

    sizes: tuple[int, ...]

    @cached_property
    def count(self) -> int:
        """Number m of micro-batches."""
        return len(self.sizes)

    @cached_property
    def total(self) -> int:
        """Number B of examples."""
        return sum(self.sizes)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Share of each micro-batch in the examples."""
        return tuple(size / self.total for size in self.sizes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First example of each micro-batch."""
        return tuple(sum(self.sizes[:j]) for j in range(self.count))

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Stretches of equal micro-batches, each as (first micro-batch, number of them, size)."""
        found: list[tuple[int, int, int]] = []
        for j, size in enumerate(self.sizes):
            if found and found[-1][2] == size:
                found[-1] = (found[-1][0], found[-1][1] + 1, size)
            else:
                found.append((j, 1, size))
        return tuple(found)

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


def halves(batch: Any, count: int, size: int) -> Any:
    """The first half (rounded up) of each of several micro-batches of one size.

    Args:
        batch: Tree of tensors, examples first.
        count: Micro-batches.
        size: Examples of each.

    Returns:
        The same structure.
    """
    half = -(-size // 2)

    def cut_off(t: Tensor) -> Tensor:
        return t.reshape(count, size, *t.shape[1:])[:, :half].flatten(0, 1) if t.ndim else t

    return tree_map(cut_off, batch)


@lru_cache(maxsize=64)
def cut(size: int, num_micro_batches: int | None = None, micro_batch_size: int | None = None) -> Shards:
    """Sizes of the micro-batches of a batch; exactly one of the two arguments is given.

    Args:
        size: Examples B of the batch.
        num_micro_batches: Number m of micro-batches; the first B mod m of them hold one example more. A batch of fewer
            examples, such as the last one of an epoch, is cut into single ones.
        micro_batch_size: Examples per micro-batch; the last one holds the rest.

    Returns:
        The shards.
    """
    check_micro_batches(num_micro_batches, micro_batch_size)
    if num_micro_batches is not None:
        count = min(num_micro_batches, size)
        base, more = divmod(size, count)
        return Shards((base + 1,) * more + (base,) * (count - more))
    assert micro_batch_size is not None
    whole, rest = divmod(size, micro_batch_size)
    return Shards((micro_batch_size,) * whole + ((rest,) if rest else ()))


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that are the same in every step, such as shares, made once.

    Args:
        values: The numbers.
        dtype: Of the tensor.
        device: Of the tensor.

    Returns:
        Shape (number of values,); nobody may write to it.
    """
    return torch.tensor(values, dtype=dtype, device=device)


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
