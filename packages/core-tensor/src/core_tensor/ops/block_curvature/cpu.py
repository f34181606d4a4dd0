"""Calls into `csrc/block_curvature.cpp`."""

from ctypes import c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function
from core_tensor.ops.dual_pass.cpu import local
from core_tensor.ops.dual_pass.reference import NO_ROOM

_ARGUMENTS = (*[c_void_p] * 8, *[c_int64] * 5, c_double, c_int)
_curvature = {
    torch.float32: function("ct_block_curvature_f32", *_ARGUMENTS, returns=c_int),
    torch.float64: function("ct_block_curvature_f64", *_ARGUMENTS, returns=c_int),
}


def block_curvature(
    offsets: Tensor,
    index: Tensor,
    coefficient: Tensor | None,
    x: Tensor,
    cap: Tensor,
    upper: Tensor | None,
    weight: Tensor | None,
    equality: bool,
    rows: int,
    scale: float,
) -> Tensor:
    """See `core_tensor.block_curvature`."""
    given = (local(offsets), index, coefficient, x, cap, upper, weight)
    arrays = [None if t is None else t.contiguous() for t in given]
    dtype = next((t.dtype for t in (coefficient, upper, weight) if t is not None), torch.float64)
    result = torch.zeros(rows, rows, dtype=torch.int64)
    fits = _curvature[dtype](
        *arrays,
        result,
        offsets.shape[0] - 1,
        rows,
        index.shape[1] if index.ndim == 2 else 1,
        int(cap.shape[0] > 1),
        int(upper is not None and (upper.shape[0] > 1 or x.shape[0] == 1)),
        scale,
        int(equality),
    )
    if not fits:
        raise ValueError(NO_ROOM)
    return result
