"""Call into `csrc/gptq_block.cpp`."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.checks import check_indices
from core_tensor.ops._library import function

_KERNELS = {
    dtype: function(f"ct_gptq_block_{name}", *[c_void_p] * 8, *[c_int64] * 3, c_int, returns=c_int)
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64"))
}


def gptq_block(
    weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, group: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """See `core_tensor.gptq_block`."""
    lower = factor.T.neg().contiguous()
    inputs = [t.contiguous() for t in (weight, lower, factor.diagonal(), scale, zero, group)]
    quantized, error = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    groups = scale.shape[0]
    if not _KERNELS[weight.dtype](*inputs, quantized, error, *weight.shape, groups, max_code):
        check_indices("group", group, groups)
    return quantized, error
