"""Call into `csrc/quantized_gather.cpp`."""

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function
from core_tensor.ops.quantized_gather.reference import METADATA

_quantized_gather = function("ct_quantized_gather", *[c_void_p] * 3, *[c_int64] * 2, c_void_p)


def quantized_gather(table: Tensor, ids: Tensor, offsets: Tensor | None) -> Tensor:
    """See `core_tensor.quantized_gather`."""
    d = table.shape[1] - METADATA
    table, ids = table.contiguous(), ids.contiguous()
    if offsets is None:
        out = torch.empty((ids.shape[0], ids.shape[1] * d), dtype=torch.float32)
        _quantized_gather(table, ids, None, ids.numel(), d, out)
        return out
    offsets = offsets.contiguous()
    out = torch.empty((len(offsets) - 1, d), dtype=torch.float32)
    _quantized_gather(table, ids, offsets, len(offsets) - 1, d, out)
    return out
