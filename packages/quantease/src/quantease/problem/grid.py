r"""Quantization grids: which real numbers a row's codes represent.

Code $c \in \{0, \dots, 2^b - 1\}$ of row $i$ and feature $j$ represents $s_{ig}(c - z_{ig})$ with $g$ the group of $j$.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a layer.

    Attributes:
        scale: Steps $s$, shape (q, G), float32, every value exactly representable in the storage dtype.
        zero: Zero points $z$, whole numbers in [0, max_code], shape (q, G), float32.
        group: Group of every feature, shape (p,), int64.
        max_code: $2^b - 1$.
    """

    scale: Tensor
    zero: Tensor
    group: Tensor
    max_code: int

    def quantize(self, values: Tensor) -> Tensor:
        """Codes of the nearest grid points.

        Args:
            values: Shape (q, p), floating point.

        Returns:
            Codes, shape (q, p), uint8.
        """
        codes = (values / self.spread(self.scale)).round_().add_(self.spread(self.zero))
        return codes.clamp_(0, self.max_code).to(torch.uint8)

    def spread(self, values: Tensor) -> Tensor:
        """Repeat per-group values for every feature of the group.

        Args:
            values: Shape (q, G).

        Returns:
            Shape (q, p), or (q, 1) with a single group, which broadcasts.
        """
        return values if values.shape[1] == 1 else values[:, self.group]

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of codes.

        Args:
            codes: Shape (q, p), uint8.
            dtype: Of the result. With scales of float16 or bfloat16 precision the product is exact in float32.

        Returns:
            Shape (q, p).
        """
        return (codes.to(dtype) - self.spread(self.zero).to(dtype)).mul_(self.spread(self.scale).to(dtype))

    def rows(self, index: Tensor) -> "Grid":
        """The grid of some rows.

        Args:
            index: Row numbers or a mask.

        Returns:
            Grid of those rows.
        """
        return replace(self, scale=self.scale[index], zero=self.zero[index])


def group_index(features: int, group_size: int) -> Tensor:
    """Group of every feature: consecutive runs of `group_size`, the last one possibly shorter.

    Args:
        features: p.
        group_size: Features per group; -1 is one group per row.

    Returns:
        Shape (p,), int64.
    """
    if group_size == -1:
        return torch.zeros(features, dtype=torch.int64)
    return torch.arange(features) // group_size


def store_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to the precision they are stored in, so that sweeps see the grid that is exported.

    Positive scales stay positive: what would round to zero becomes the least positive number of `dtype`.

    Args:
        scale: Positive steps.
        dtype: float16, bfloat16 or float32.

    Returns:
        float32 tensor of values representable in `dtype`.

    Raises:
        ValueError: If a scale is beyond the largest number of `dtype`.
    """
    info = torch.finfo(dtype)
    stored = scale.to(dtype).float().clamp_min(info.smallest_normal * info.eps)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(
            f"weight: expected steps below {info.max:.3g} for scale_dtype {dtype}, got {float(scale.max())}"
        )
    return stored


def minmax_grid(
    weight: Tensor,
    *,
    bits: int,
    group: Tensor,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    mask: Tensor | None = None,
) -> Grid:
    r"""The grid from the extreme weights of every row and group, which always contains zero.

    Asymmetric: $s = (hi - lo) / (2^b - 1)$, $z = \operatorname{round}(-lo / s)$ with
    $lo = \min(0, \min_j W_{ij})$, $hi = \max(0, \max_j W_{ij})$. Symmetric: $hi = -lo = \max_j |W_{ij}|$,
    $z = 2^{b-1}$. A row of zeros gets $lo, hi = -1, 1$.

    Departure: $s$ is rounded to `scale_dtype` before $z$ is taken, so that the grid is the one that is exported.

    Args:
        weight: W, shape (q, p).
        bits: b.
        group: Group of every feature, shape (p,), int64.
        symmetric: Which of the two.
        scale_dtype: Precision in which scales are stored.
        mask: Positions left out of the extremes, shape (q, p), bool.

    Returns:
        The grid.

    Source: arXiv 2309.01885, section 2; ranges as in the authors' code.
    """
    lo, hi = extremes(weight, group, mask)
    if symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    empty = hi - lo <= 0
    lo, hi = lo.masked_fill(empty, -1.0), hi.masked_fill(empty, 1.0)
    return grid_between(lo, hi, bits=bits, group=group, symmetric=symmetric, scale_dtype=scale_dtype)


def extremes(weight: Tensor, group: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least and greatest weight of every row and group, with zero among the candidates.

    Args:
        weight: W, shape (q, p).
        group: Group of every feature, shape (p,), int64.
        mask: Positions left out, shape (q, p), bool.

    Returns:
        Two tensors of shape (q, G), float32.
    """
    values = weight.float() if mask is None else weight.float().masked_fill(mask, 0.0)
    index = group.expand_as(values)
    start = values.new_zeros(values.shape[0], int(group.max()) + 1)
    return start.scatter_reduce(1, index, values, "amin"), start.scatter_reduce(1, index, values, "amax")


def grid_between(
    lo: Tensor, hi: Tensor, *, bits: int, group: Tensor, symmetric: bool, scale_dtype: torch.dtype
) -> Grid:
    """The grid of $2^b$ equal steps whose ends are `lo` and `hi`.

    Args:
        lo: At most 0, shape (q, G).
        hi: At least 0, with `hi > lo`, shape (q, G).
        bits: b.
        group: Group of every feature, shape (p,), int64.
        symmetric: Zero point in the middle instead of at `-lo`.
        scale_dtype: Precision in which scales are stored.

    Returns:
        The grid.
    """
    max_code = 2**bits - 1
    scale = store_scale((hi - lo) / max_code, scale_dtype)
    zero = torch.full_like(scale, 2.0 ** (bits - 1)) if symmetric else ((0.0 - lo) / scale).round().clamp(0, max_code)
    return Grid(scale, zero, group, max_code)
