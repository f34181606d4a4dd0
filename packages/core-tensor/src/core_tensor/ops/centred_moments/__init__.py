r"""Mean and centred second moments of the rows of a matrix, in float64 from any floating dtype.

$$ \mu = \frac1n \sum_i x_i, \qquad S = \sum_i (x_i - \mu)(x_i - \mu)^\top . $$

The kernel widens and centers rows as it packs them, so that no float64 copy of the matrix exists, forms only half of
the symmetric S, and sums every entry in one order whatever the number of threads.
Source: the shifted form of Chan, Golub and LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115.
"""

import torch
from torch import Tensor

from core_tensor.checks import check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.centred_moments import cpu, reference


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    d = x.shape[1]
    return x.new_empty(d, dtype=torch.float64), x.new_empty((d, d), dtype=torch.float64)


_centred_moments = operator(
    "centred_moments(Tensor x) -> (Tensor, Tensor)",
    reference=reference.centred_moments,
    fake=_fake,
    cpu=cpu.centred_moments,
    cuda="core_tensor.ops.centred_moments.triton:centred_moments",
)


def centred_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scatter of the rows of a matrix.

    Args:
        x: Rows, shape (n, d), n and d at least 1, float16, bfloat16, float32 or float64.

    Returns:
        Mean, shape (d,), and scatter S, shape (d, d), symmetric to the bit; float64. No gradient passes.

    Raises:
        ValueError: If `x` is no matrix or empty.
        TypeError: If `x` has another dtype.
    """
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    check_tensor("x", x, ndim=2, dtype=dtypes, nonempty=True)
    result: tuple[Tensor, Tensor] = _centred_moments(x.detach())
    return result
