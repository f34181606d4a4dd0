"""Plain torch coordinate descent: the loop over features as the paper writes it."""

import torch
from torch import Tensor

from core_tensor.checks import check_indices


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
    quantize: bool,
) -> Tensor:
    """See `core_tensor.cd_block`."""
    check_indices("group", group, scale.shape[0])
    updated = torch.empty_like(weight, memory_format=torch.contiguous_format)
    delta = torch.zeros_like(updated)  # new minus old residual of the features already visited
    for j in range(weight.shape[0]):
        beta = weight[j] + correction[j] + sigma[j, :j] @ delta[:j]  # (q,)
        value = beta
        if quantize:
            s, z = scale[group[j]], zero[group[j]]
            value = s * ((torch.round(beta / s) + z).clamp(0, max_code) - z)
            if mask is not None:
                value = torch.where(mask[j], beta, value)
        updated[j] = weight[j] - value
        delta[j] = updated[j] - residual[j]
    return updated
