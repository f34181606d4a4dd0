"""What pass 1 of ghost mode hands to pass 2: directions in factors or rows, products of the batch itself."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class LowRank:
    """A direction that is applied through its factors.

    Attributes:
        left: Factors (m, r, d_0), with ASAM's T^2 multiplied in.
        right: Factors (m, r, d_1).
        bias: Radius of the bias that moves along over the matrix's own; 0 if there is none.
        owner: Index of that bias, or None.
        flipped: Whether the result is on the second dimension's side.
        coefficient: c_j, (m,); set once the norms are known.
    """

    left: Tensor
    right: Tensor
    bias: float
    owner: int | None
    flipped: bool
    coefficient: Tensor = field(init=False)

    @property
    def inner(self) -> Tensor:
        """Rows on the side of the input."""
        return self.left if self.flipped else self.right

    @property
    def outer(self) -> Tensor:
        """Rows on the side of the result, where the bias is added."""
        return self.right if self.flipped else self.left


@dataclass
class Tokens:
    """A direction of few rows of an embedding.

    Attributes:
        keys: Sorted micro-batch * V + token, shape (n,).
        rows: The rows' directions, shape (n, d).
    """

    keys: Tensor
    rows: Tensor


class Kept(NamedTuple):
    """A product whose input is no activation, to be taken over by pass 2 if nothing was overwritten meanwhile.

    Attributes:
        x: Input, without graph.
        y: Result, without graph.
        versions: Version counters of both.
    """

    x: Tensor
    y: Tensor
    versions: tuple[int, int]

    def serves(self, x: Tensor) -> bool:
        """Whether an input is this one, unchanged.

        Args:
            x: Input of the same call in pass 2.

        Returns:
            True if the result may be taken over.
        """
        same = x.data_ptr() == self.x.data_ptr() and x.shape == self.x.shape and x.stride() == self.x.stride()
        return same and x.dtype == self.x.dtype and (x._version, self.y._version) == self.versions


def joined(parts: list[Tensor]) -> Tensor:
    """Concatenate the rows of several uses; those of one stay as they are, without a copy.

    Args:
        parts: Shape (m, r, d) each.

    Returns:
        Shape (m, sum of r, d).
    """
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a type; a call of `Tensor.to` costs more than the question whether it is needed.

    Args:
        x: Any tensor.
        dtype: Wanted type.

    Returns:
        The tensor itself or a copy.
    """
    return x if x.dtype is dtype else x.to(dtype)


def high(x: Tensor) -> Tensor:
    """At least float32: sums of squares of half precision numbers overflow or lose their digits.

    Args:
        x: Any floating-point tensor.

    Returns:
        The tensor, or its float32 copy.
    """
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x
