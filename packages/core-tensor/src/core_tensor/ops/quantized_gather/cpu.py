"""Call into `csrc/quantized_gather.cpp`."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function
from core_tensor.ops.quantized_gather import reference
from core_tensor.ops.quantized_gather.reference import METADATA

_quantized_gather = function("ct_quantized_gather", *[c_void_p] * 3, *[c_int64] * 4, c_void_p, returns=c_int)


def quantized_gather(table: Tensor, ids: Tensor, offsets: Tensor | None) -> Tensor:
    """See `core_tensor.quantized_gather`."""
    rows, d = table.shape[0], table.shape[1] - METADATA
    table, ids, total = table.contiguous(), ids.contiguous(), ids.numel()
    if offsets is None:
        count, shape = total, (ids.shape[0], ids.shape[1] * d)
    else:
        offsets = offsets.contiguous()
        count = len(offsets) - 1
        shape = (count, d)
    out = torch.empty(shape, dtype=torch.float32)
    if not _quantized_gather(table, ids, offsets, rows, total, count, d, out):
        reference.check(table, ids, offsets)  # says what the kernel has refused
        raise AssertionError("quantized_gather: the kernel refused what the reference accepts")
    return out
