r"""GPTQ (optimal brain quantization in a fixed order) inside one block of features, every out feature at once.

With $U$ the upper Cholesky factor of $\Sigma^{-1}$ ($\Sigma^{-1} = U^\top U$), for $j = 1, \dots, B$:

$$ \hat W_j = q(W_j), \qquad e_j = (W_j - \hat W_j) / U_{jj}, \qquad W_k \leftarrow W_k - U_{jk} e_j \quad (k > j). $$

The update of the features behind the block is one GEMM of the caller, `W[rest] -= U[block, rest].T @ e`.
Source: GPTQ, arXiv 2210.17323, Alg. 1.
"""

import torch
from torch import Tensor

from core_tensor.checks import check_number, check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.gptq_block import cpu, reference

MAX_BLOCK = 1024
"""Features per block at most."""


def _fake(
    weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, group: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    quantized = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return quantized, torch.empty_like(quantized)


_gptq_block = operator(
    "gptq_block(Tensor weight, Tensor factor, Tensor scale, Tensor zero, Tensor group, int max_code)"
    " -> (Tensor, Tensor)",
    reference=reference.gptq_block,
    fake=_fake,
    cpu=cpu.gptq_block,
    cuda="core_tensor.ops.gptq_block.triton:gptq_block",
)


def gptq_block(
    weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, group: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Quantize a block of B features and spread each one's error over those behind it in the block.

    Args:
        weight: Weights as updated by the blocks before, feature-major, shape (B, q), float32 or float64.
        factor: The block of U, shape (B, B); its diagonal and upper part are used.
        scale: Grid steps, shape (G, q), positive.
        zero: Zero points, whole numbers, shape (G, q).
        group: Row of `scale` and `zero` for every feature, shape (B,), int64.
        max_code: Largest code, `2**bits - 1`.

    Returns:
        Quantized weights and scaled errors e, both of shape (B, q).

    Raises:
        ValueError: If shapes or devices do not fit, a group is out of range, or the block has more than 1024 features.
        TypeError: If dtypes differ or are neither float32 nor float64.
    """
    check_tensor("weight", weight, ndim=2, dtype=(torch.float32, torch.float64))
    size, columns = weight.shape
    check_number("block size", size, high=MAX_BLOCK, integer=True)
    device = weight.device
    check_tensor("factor", factor, shape=(size, size), dtype=weight.dtype, device=device)
    check_tensor("scale", scale, shape=(None, columns), dtype=weight.dtype, device=device)
    check_tensor("zero", zero, shape=tuple(scale.shape), dtype=weight.dtype, device=device)
    check_tensor("group", group, shape=(size,), dtype=torch.int64, device=device)
    check_number("max_code", max_code, low=1, high=255, integer=True)
    result: tuple[Tensor, Tensor] = _gptq_block(weight, factor, scale, zero, group, max_code)
    return result
