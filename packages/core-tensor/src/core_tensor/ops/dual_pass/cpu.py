"""Calls into `csrc/dual_pass.cpp`."""

from ctypes import c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function
from core_tensor.ops.dual_pass import reference

_ARGUMENTS = (*[c_void_p] * 14, *[c_int64] * 5, c_double, c_int)
_pass = {
    torch.float32: function("ct_dual_pass_f32", *_ARGUMENTS, returns=c_int),
    torch.float64: function("ct_dual_pass_f64", *_ARGUMENTS, returns=c_int),
}


def local(offsets: Tensor) -> Tensor:
    """Offsets into the arrays of a run of blocks, which keeps the offsets of the whole."""
    first = int(offsets[0])
    return offsets if first == 0 else offsets - first


def dual_pass(
    offsets: Tensor,
    index: Tensor,
    cost: Tensor,
    coefficient: Tensor | None,
    lam: Tensor,
    gamma: float,
    cap: Tensor,
    upper: Tensor | None,
    weight: Tensor | None,
    equality: bool,
    anchor: Tensor | None,
    shrink: Tensor | None,
    scale: Tensor,
    bounds: Tensor,
    primal: bool,
) -> tuple[Tensor, Tensor]:
    """See `core_tensor.dual_pass`."""
    given = (local(offsets), index, cost, coefficient, lam, cap, upper, weight, anchor, shrink, scale, bounds)
    arrays = [None if t is None else t.contiguous() for t in given]
    sums = torch.zeros(scale.shape[0], dtype=torch.int64)
    x = torch.zeros(cost.shape[0] if primal else 0, dtype=torch.float64)
    fits = _pass[cost.dtype](
        *arrays,
        sums,
        x if primal else None,
        lam.shape[0],
        index.shape[1] if index.ndim == 2 else 1,
        bounds.shape[0] - 1,
        int(cap.shape[0] > 1),
        int(upper is not None and (upper.shape[0] > 1 or cost.shape[0] == 1)),
        gamma,
        int(equality),
    )
    if not fits:
        raise ValueError(reference.NO_ROOM)
    return sums, x
