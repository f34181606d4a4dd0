"""Call into `csrc/ghost_norms.cpp`."""

from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function

_KERNELS = {
    dtype: function(f"ct_ghost_norms_{name}", *[c_void_p] * 3, *[c_int64] * 4, c_double)
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64"))
}


def ghost_norms(left: list[Tensor], right: list[Tensor], bias: list[float]) -> Tensor:
    """See `core_tensor.ghost_norms`."""
    squares = torch.zeros(left[0].shape[0], dtype=torch.float64)
    for a, b, beta in zip(left, right, bias, strict=True):
        _KERNELS[a.dtype](a.contiguous(), b.contiguous(), squares, *a.shape, b.shape[2], beta)
    return squares
