"""Call into `csrc/low_rank_add.cpp`."""

from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function
from core_tensor.ops.low_rank_add import reference

RANK = 32
"""Largest rank of the kernel: a batched GEMM, which keeps more of a factor in the first cache, is faster beyond it."""

_KERNELS = {
    dtype: function(f"ct_low_rank_add_{name}", *[c_void_p] * 6, *[c_int64] * 6, c_double)
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64"))
}


def low_rank_add(
    base: Tensor | None, x: Tensor, inner: Tensor, outer: Tensor, coefficient: Tensor, bias: float, out: Tensor
) -> None:
    """See `core_tensor.low_rank_add`."""
    kernel = _KERNELS.get(out.dtype)
    if kernel is None or inner.shape[1] > RANK or not out.is_contiguous():
        reference.low_rank_add(base, x, inner, outer, coefficient, bias, out)
        return
    inputs = [None if t is None else t.contiguous() for t in (base, x, inner, outer, coefficient)]
    n, rank, width = inner.shape
    rows, out_width = out.shape
    stride = out_width if base is not None and base.ndim == 2 else 0
    kernel(out, *inputs, stride, n, rows // n, rank, width, out_width, bias)
