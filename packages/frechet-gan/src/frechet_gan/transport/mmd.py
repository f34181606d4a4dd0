r"""Maximum mean discrepancy: the unbiased estimate, KID's cubic kernel and Gaussian kernels.

$$ \mathrm{MMD}^2 = \frac{1}{n(n-1)}\sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)}\sum_{i \ne j} k(y_i, y_j)
   - \frac{2}{nm}\sum_{ij} k(x_i, y_j) $$
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from core_tensor.checks import check_number
from torch import Tensor

from frechet_gan.frechet.distance import check_pair

Kernel = Callable[[Tensor, Tensor], Tensor]
BLOCK = 1024
"""Rows of a distance or kernel matrix that exist at a time where no gradient is wanted."""


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (xᵀy / d + 1)³.

    Args:
        x: Points, shape (n, d).
        y: Points, shape (m, d).

    Returns:
        Kernel matrix, shape (n, m).
    """
    kernel: Tensor = (x @ y.mT / x.shape[1] + 1) ** 3
    return kernel


@dataclass(frozen=True)
class GaussianKernel:
    """Sum of exp(-|x - y|² / (2 b²)) over bandwidths b.

    Attributes:
        bandwidths: Bandwidths, in the unit of the features.
    """

    bandwidths: tuple[float, ...]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Kernel matrix.

        Args:
            x: Points, shape (n, d).
            y: Points, shape (m, d).

        Returns:
            Kernel matrix, shape (n, m).
        """
        squares = squared_distances(x, y)
        terms = [(-squares / (2 * b * b)).exp() for b in self.bandwidths]
        return torch.stack(terms).sum(0)

    @classmethod
    def from_median(cls, y: Tensor, factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)) -> "GaussianKernel":
        """Bandwidths around the median distance between points.

        Args:
            y: Points, shape (m, d).
            factors: Multiples of the median distance.

        Returns:
            The kernel.
        """
        squares = squared_distances(y, y)
        above = squares[torch.triu(torch.ones_like(squares, dtype=torch.bool), 1)]
        median = float(above.median().sqrt()) or 1.0
        return cls(tuple(f * median for f in factors))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances by one matrix product.

    Args:
        x: Points, shape (n, d).
        y: Points, shape (m, d).

    Returns:
        Distances, shape (n, m), non-negative.
    """
    centre = y.detach().mean(0)  # a common shift costs no digits
    x, y = x - centre, y - centre
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT).clamp_min(0)


def mmd(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Unbiased squared MMD; may be negative.

    Args:
        x: Sample, shape (n, d).
        y: Sample, shape (m, d).
        kernel: Kernel.

    Returns:
        A float64 scalar, differentiable in both.

    Source:
        Gretton et al. 2012, Lemma 6.
    """
    x, y = x.double(), y.double()
    n, m = x.shape[0], y.shape[0]
    own_x, own_y, cross = kernel(x, x), kernel(y, y), kernel(x, y)
    value: Tensor = (own_x.sum() - own_x.diagonal().sum()) / (n * (n - 1)) - 2 * cross.mean()
    return value + (own_y.sum() - own_y.diagonal().sum()) / (m * (m - 1))


def kid(x: Tensor, y: Tensor, *, subsets: int = 50, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Kernel inception distance: mean and standard deviation of the cubic-kernel MMD² over random subsets.

    Args:
        x: Features, shape (n, d).
        y: Features, shape (m, d).
        subsets: Number of subsets.
        subset_size: Rows per subset, at most half of the smaller sample: subsets of all rows would not differ.
        seed: Chooses the subsets.

    Returns:
        Mean and standard deviation over the subsets; the latter is 0 for one subset.

    Source:
        arXiv 1801.01401.
    """
    check_pair(x, y)
    check_number("subsets", subsets, low=1, integer=True)
    check_number("subset_size", subset_size, low=2, integer=True)
    generator = torch.Generator().manual_seed(seed)
    size = subset_rows(x, y, subset_size)
    values = torch.stack(
        [
            mmd(
                x.detach()[torch.randperm(x.shape[0], generator=generator)[:size]],
                y.detach()[torch.randperm(y.shape[0], generator=generator)[:size]],
                cubic_kernel,
            )
            for _ in range(subsets)
        ]
    )
    return float(values.mean()), float(values.std()) if subsets > 1 else 0.0


def subset_rows(x: Tensor, y: Tensor, subset_size: int = 1000) -> int:
    """Rows of either side in one of KID's subsets: at most half of the smaller sample."""
    return min(subset_size, max(2, min(x.shape[0], y.shape[0]) // 2))


def cmmd(x: Tensor, y: Tensor, bandwidth: float = 10.0) -> float:
    """CMMD: 1000 times the MMD² of a Gaussian kernel on features of unit length.

    Args:
        x: Features, shape (n, d).
        y: Features, shape (m, d).
        bandwidth: Bandwidth σ of the kernel.

    Returns:
        The distance, with the V-statistic's diagonal as in the reference code.

    Source:
        arXiv 2401.09603.
    """
    check_pair(x, y)
    x, y = (torch.nn.functional.normalize(t.detach().double()) for t in (x, y))
    kernel = GaussianKernel((bandwidth,))
    return 1000 * (_mean(kernel, x, x) + _mean(kernel, y, y) - 2 * _mean(kernel, x, y))


def _mean(kernel: Kernel, x: Tensor, y: Tensor) -> float:
    # mean of the kernel matrix, of which a block of rows exists at a time
    return float(sum(kernel(rows, y).sum() for rows in x.split(BLOCK))) / (x.shape[0] * y.shape[0])
