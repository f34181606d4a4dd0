"""Where the examples of a batch lie in a tensor, and how the micro-batches cut them."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msam.engines.ghost.errors import UnsupportedError
from msam.step.batches import Shards


@dataclass(frozen=True)
class Layout:
    """How one use of a parameter lays out the examples of the batch.

    Attributes:
        dim: Dimension of the result that counts examples (each may own several consecutive rows).
        shared: Whether the input is the same for all examples (positions, say); it is then repeated for each.
    """

    dim: int = 0
    shared: bool = False


@dataclass(frozen=True)
class Examples:
    """The examples of one pass, wherever a use lays them out.

    Attributes:
        shards: How the batch of this pass is cut.
    """

    shards: Shards
    _stretches: dict[int, tuple[tuple[int, int, int, int], ...]] = field(default_factory=dict, init=False)

    def rows_each(self, size: int) -> int:
        """Consecutive rows that each example owns in a dimension.

        Args:
            size: Length of the dimension.

        Returns:
            size / B.

        Raises:
            UnsupportedError: If B does not divide it.
        """
        each, rest = divmod(size, self.shards.total)
        if rest or not each:
            raise UnsupportedError(
                f"a dimension of {size} does not count the {self.shards.total} examples of the batch"
            )
        return each

    def spread(self, x: Tensor, layout: Layout) -> Tensor:
        """Repeat an input that all examples share, once for each.

        Args:
            x: Input; untouched unless the layout is shared.
            layout: The use's layout.

        Returns:
            x, or x expanded to shape (B, ...).
        """
        if not layout.shared or self.shards.count == 1:
            return x
        return (x if x.shape[0] == 1 else x[None]).expand(
            self.shards.total, *(x.shape[1:] if x.shape[0] == 1 else x.shape)
        )

    def blocks(self, x: Tensor, layout: Layout) -> list[Tensor]:
        """The last dimension's vectors, by micro-batch, one tensor for each stretch of equal micro-batches.

        Args:
            x: Shape (..., d).
            layout: Which dimension counts examples.

        Returns:
            Tensors of shape (micro-batches of the stretch, rows of each, d).
        """
        if layout.dim and self.shards.count > 1:
            x = x.movedim(layout.dim, 0)
        stretches = self.stretches(x.shape[0])
        if len(stretches) == 1:  # all of x
            return [x.reshape(stretches[0][3], -1, x.shape[-1])]
        return [x[start:stop].reshape(count, -1, x.shape[-1]) for start, stop, _, count in stretches]

    def stretches(self, length: int) -> tuple[tuple[int, int, int, int], ...]:
        """Stretches of equal micro-batches in a dimension that counts examples.

        Args:
            length: Length of the dimension.

        Returns:
            First and last row, first micro-batch and number of micro-batches of each.
        """
        found = self._stretches.get(length)
        if found is None:  # once per pass: every layer asks
            one = self.shards.count == 1
            found = ((0, length, 0, 1),) if one else self.shards.stretches(self.rows_each(length))
            self._stretches[length] = found
        return found

    def even(self, weights: Tensor) -> bool:
        """Whether every micro-batch has its share of a sum.

        Args:
            weights: Terms, or true where 1 is to be counted; examples first.

        Returns:
            True if the sums are to each other as the numbers of examples, to rounding.
        """
        sums = [float(weights[start:stop].sum()) for start, stop in self.bounds(weights.shape[0])]
        pairs = zip(sums, self.shards.sizes, strict=True)
        return all(math.isclose(s * self.shards.total, sum(sums) * n, rel_tol=1e-12) for s, n in pairs)

    def bounds(self, length: int) -> list[tuple[int, int]]:
        """Rows of every micro-batch in a dimension that counts examples.

        Args:
            length: Length of the dimension.

        Returns:
            First and last row (exclusive) of each.
        """
        if self.shards.count == 1:
            return [(0, length)]
        each = self.rows_each(length)
        return [(s * each, (s + n) * each) for s, n in zip(self.shards.starts, self.shards.sizes, strict=True)]

    @property
    def splits(self) -> bool:
        """Whether a dimension of examples can be split by micro-batch as a view: several of one size."""
        return self.shards.count > 1 and len(self.shards.runs) == 1

    def sums(self, values: Tensor, layout: Layout, places: range) -> Tensor:
        """Sum over everything but the micro-batches and a parameter's own dimensions.

        Args:
            values: Terms.
            layout: Which dimension counts examples.
            places: The parameter's dimensions.

        Returns:
            Shape (m, *shape of the parameter).
        """
        others = [d for d in range(values.ndim) if d not in places]
        if self.shards.count == 1:
            return values.sum(others)[None] if others else values[None]
        if self.splits and layout.dim < places.start:
            self.rows_each(values.shape[layout.dim])
            rest = [d + (d > layout.dim) for d in others if d != layout.dim]
            sums: Tensor = values.unflatten(layout.dim, (self.shards.count, -1)).sum([layout.dim + 1, *rest])
            return sums
        bounds = self.bounds(values.shape[layout.dim])
        return torch.stack([values.narrow(layout.dim, start, stop - start).sum(others) for start, stop in bounds])

    def per_example(self, replicas: Tensor, ndim: int, layout: Layout, length: int) -> Tensor:
        """Give every example its micro-batch's replica of a parameter, shaped to broadcast against an activation.

        Args:
            replicas: One replica per micro-batch, shape (m, *shape).
            ndim: Dimensions of the activation; `shape` is aligned to the trailing ones.
            layout: Which dimension counts examples.
            length: Length of that dimension.

        Returns:
            A tensor of `ndim` dimensions.

        Raises:
            UnsupportedError: If the parameter itself extends over the dimension of the examples.
        """
        if self.shards.count == 1:
            return replicas[0]
        shape = (1,) * (ndim + 1 - replicas.ndim) + tuple(replicas.shape[1:])
        if len(shape) != ndim or shape[layout.dim] != 1:
            raise UnsupportedError(f"a parameter of shape {tuple(replicas.shape[1:])} reaches across examples")
        each = self.rows_each(length)
        runs = self.shards.runs
        if len(runs) == 1:
            rows = replicas[:, None].expand(-1, runs[0][2] * each, *replicas.shape[1:]).flatten(0, 1)
        else:
            sizes = torch.tensor([s * each for s in self.shards.sizes], device=replicas.device)
            rows = replicas.repeat_interleave(sizes, dim=0, output_size=length)
        return rows.view(length, *shape).transpose(0, layout.dim + 1).squeeze(0)
