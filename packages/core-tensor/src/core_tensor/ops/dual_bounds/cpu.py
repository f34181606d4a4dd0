"""Call into `csrc/dual_bounds.cpp`."""

from ctypes import c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function
from core_tensor.ops.dual_bounds import reference

_bounds = function("ct_dual_bounds", *[c_void_p] * 5, c_double, *[c_void_p] * 3, c_int64, returns=c_int)


def dual_bounds(
    sums: Tensor, scale: Tensor, lam: Tensor, budgets: Tensor, free: Tensor | None, keep: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `core_tensor.dual_bounds`."""
    given = [None if t is None else t.contiguous() for t in (sums, scale, lam, budgets, free)]
    gradient, shrink, found = (torch.empty(n, dtype=torch.float64) for n in (*lam.shape, *lam.shape, 9))
    if not _bounds(*given, keep, gradient, shrink, found, *lam.shape):
        reference.check_scale(scale)
    return gradient, shrink, found
