"""Calls into `csrc/map_head.cpp`."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function

_NAMES = ((torch.float32, "float32"), (torch.float64, "float64"))
_FORWARD = {dtype: function(f"ct_map_head_{name}", *[c_void_p] * 9, *[c_int64] * 3, c_int) for dtype, name in _NAMES}
_BACKWARD = {
    dtype: function(f"ct_map_head_backward_{name}", *[c_void_p] * 15, *[c_int64] * 3) for dtype, name in _NAMES
}


def map_head(
    h: Tensor, base: Tensor, y: Tensor, w: Tensor, lengths: Tensor, mu: Tensor, P: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """See `core_tensor.map_head`."""
    tasks, rows, d = h.shape
    e, H = torch.empty_like(mu, memory_format=torch.contiguous_format), h.new_empty(tasks, d, d)
    inputs = [t.contiguous() for t in (h, base, y, w, lengths, mu, P)]
    _FORWARD[h.dtype](*inputs, e, H, tasks, rows, d, steps)
    return e, H


def map_head_backward(
    v: Tensor, e: Tensor, h: Tensor, base: Tensor, y: Tensor, w: Tensor, lengths: Tensor, mu: Tensor, P: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.map_head_backward`."""
    tasks, rows, d = h.shape
    inputs = [t.contiguous() for t in (v, e, h, base, y, w, lengths, mu, P)]
    outputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (h, base, y, w, mu)]
    outer = torch.empty(tasks, d, dtype=torch.float64)  # H^-1 v of every task, in double for the sum over tasks
    _BACKWARD[h.dtype](*inputs, *outputs, outer, tasks, rows, d)
    to_P = -outer.T @ (e.double() - mu.double())
    return *outputs, ((to_P + to_P.T) / 2).to(P.dtype)  # type: ignore[return-value]
