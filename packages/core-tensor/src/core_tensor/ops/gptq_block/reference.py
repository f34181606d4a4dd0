"""Plain torch GPTQ: the loop over features as the paper writes it."""

import torch
from torch import Tensor

from core_tensor.checks import check_indices


def gptq_block(
    weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, group: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """See `core_tensor.gptq_block`."""
    check_indices("group", group, scale.shape[0])
    w = weight.clone(memory_format=torch.contiguous_format)
    quantized, error = torch.empty_like(w), torch.empty_like(w)
    for j in range(w.shape[0]):
        s, z = scale[group[j]], zero[group[j]]
        quantized[j] = s * ((torch.round(w[j] / s) + z).clamp(0, max_code) - z)
        error[j] = (w[j] - quantized[j]) / factor[j, j]
        w[j + 1 :] -= torch.outer(factor[j, j + 1 :], error[j])
    return quantized, error
