"""Call into `csrc/low_rank_add.cpp`."""

from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor._library import function
from core_tensor.low_rank_add import reference

RANK = 32
"""Largest rank of the kernel: a batched GEMM, which keeps more of a factor in the first cache, is faster beyond it."""

_KERNELS = {
    dtype: function(f"ct_low_rank_add_{name}", *[c_void_p] * 5, *[c_int64] * 5, c_double)
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64"))
}


def low_rank_add_(y: Tensor, x: Tensor, inner: Tensor, outer: Tensor, coefficient: Tensor, bias: float) -> None:
    """See `core_tensor.low_rank_add_`."""
    kernel = _KERNELS.get(y.dtype)
    if kernel is None or inner.shape[1] > RANK or not y.is_contiguous():
        reference.low_rank_add_(y, x, inner, outer, coefficient, bias)
        return
    inputs = [t.contiguous() for t in (x, inner, outer, coefficient)]
    n, rank, width = inner.shape
    rows, out_width = y.shape
    kernel(y, *inputs, n, rows // n, rank, width, out_width, bias)
