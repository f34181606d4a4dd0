"""Call into `csrc/centred_moments.cpp`."""

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function

_KERNELS = {
    dtype: function(f"ct_centred_moments_{name}", c_void_p, c_void_p, c_void_p, c_int64, c_int64)
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32"), (torch.float64, "float64"))
}


def centred_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `core_tensor.centred_moments`."""
    rows = (x.float() if x.dtype == torch.float16 else x).contiguous()
    d = rows.shape[1]
    mean, scatter = torch.empty(d, dtype=torch.float64), torch.empty(d, d, dtype=torch.float64)
    _KERNELS[rows.dtype](rows, mean, scatter, *rows.shape)
    return mean, scatter
