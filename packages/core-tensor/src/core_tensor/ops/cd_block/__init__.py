r"""Cyclic coordinate descent inside one block of features, every out feature at once.

Source: QuantEase, arXiv 2309.01885, Alg. 2.

The layer problem is $\min_{\hat W} \operatorname{tr}(D \Sigma D^\top)$ with $D = W - \hat W$ and $\hat W$ on a
grid. With $\tilde\Sigma_{jk} = \Sigma_{jk} / \Sigma_{jj}$ and zero diagonal, the minimiser in coordinate $j$ is

$$ \tilde\beta_j = W_j + \sum_{k} \tilde\Sigma_{jk} D_k, \qquad \hat W_j \leftarrow q(\tilde\beta_j),
\qquad q(x) = s \, (\operatorname{clamp}(\operatorname{round}(x / s) + z, 0, c_{\max}) - z). $$

The sum over the features outside the block and over the old residuals inside it is one GEMM of the caller,
`correction = sigma_rows @ residual`; this operator adds what changes while it walks through the block.

Departure: the paper keeps $P$ and $\hat P$ for all features; the left-looking form keeps only $D$, so nothing drifts.
"""

import torch
from torch import Tensor

from core_tensor.checks import check_flag, check_number, check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.cd_block import cpu, reference

MAX_BLOCK = 1024
"""Features per block at most."""


def _fake(
    correction: Tensor,
    weight: Tensor,
    residual: Tensor,
    sigma: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    mask: Tensor | None,
    max_code: int,
    quantize: bool,
) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


_cd_block = operator(
    "cd_block(Tensor correction, Tensor weight, Tensor residual, Tensor sigma, Tensor scale, Tensor zero, Tensor group,"
    " Tensor? mask, int max_code, bool quantize) -> Tensor",
    reference=reference.cd_block,
    fake=_fake,
    cpu=cpu.cd_block,
    cuda="core_tensor.ops.cd_block.triton:cd_block",
)


def cd_block(
    correction: Tensor,
    weight: Tensor,
    residual: Tensor,
    sigma: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    mask: Tensor | None,
    max_code: int,
    quantize: bool = True,
) -> Tensor:
    """One pass of coordinate descent over a block of B features, for all q out features.

    Args:
        correction: Rows of the block of `sigma_tilde @ residual`, shape (B, q), float32 or float64.
        weight: Weights to approximate, feature-major, shape (B, q).
        residual: `weight - quantized` before the pass, shape (B, q).
        sigma: The block of the row-normalized Gram matrix, shape (B, B); only its strictly lower part is used.
        scale: Grid steps, shape (G, q), positive.
        zero: Zero points, whole numbers, shape (G, q).
        group: Row of `scale` and `zero` for every feature, shape (B,), int64.
        mask: Coordinates that stay continuous (outliers), shape (B, q), bool; None for none.
        max_code: Largest code, `2**bits - 1`.
        quantize: False for a relaxed sweep, which rounds nothing.

    Returns:
        The residual after the pass, shape (B, q).

    Raises:
        ValueError: If shapes or devices do not fit, a group is out of range, or the block has more than 1024 features.
        TypeError: If dtypes differ or are neither float32 nor float64.
    """
    check_tensor("weight", weight, ndim=2, dtype=(torch.float32, torch.float64))
    size, columns = weight.shape
    check_number("block size", size, high=MAX_BLOCK, integer=True)
    device = weight.device
    check_tensor("scale", scale, shape=(None, columns), dtype=weight.dtype, device=device)
    for name, tensor, shape in (
        ("correction", correction, (size, columns)),
        ("residual", residual, (size, columns)),
        ("sigma", sigma, (size, size)),
        ("zero", zero, tuple(scale.shape)),
    ):
        check_tensor(name, tensor, shape=shape, dtype=weight.dtype, device=device)
    check_tensor("group", group, shape=(size,), dtype=torch.int64, device=device)
    if mask is not None:
        check_tensor("mask", mask, shape=(size, columns), dtype=torch.bool, device=device)
    check_number("max_code", max_code, low=1, high=255, integer=True)
    check_flag("quantize", quantize)
    updated: Tensor = _cd_block(correction, weight, residual, sigma, scale, zero, group, mask, max_code, quantize)
    return updated
