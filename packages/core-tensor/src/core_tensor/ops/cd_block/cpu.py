"""Call into `csrc/cd_block.cpp`."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.checks import check_indices
from core_tensor.ops._library import function

_KERNELS = {
    dtype: function(f"ct_cd_block_{name}", *[c_void_p] * 9, *[c_int64] * 3, c_int, c_int, returns=c_int)
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64"))
}


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
    inputs = [t.contiguous() for t in (correction, weight, residual, sigma, scale, zero, group)]
    updated = torch.empty_like(inputs[1])
    flags = None if mask is None else mask.contiguous()
    groups = scale.shape[0]
    if not _KERNELS[weight.dtype](*inputs, flags, updated, *weight.shape, groups, max_code, quantize):
        check_indices("group", group, groups)
    return updated
