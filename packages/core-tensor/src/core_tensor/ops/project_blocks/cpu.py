"""Calls into `csrc/project_blocks.cpp`."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.checks import check_offsets
from core_tensor.ops._library import function

_project = function("ct_project_blocks", *[c_void_p] * 6, *[c_int64] * 4, c_int, returns=c_int)


def project_blocks(
    values: Tensor, offsets: Tensor, cap: Tensor, upper: Tensor | None, weight: Tensor | None, equality: bool
) -> Tensor:
    """See `core_tensor.project_blocks`."""
    values, offsets, cap = values.contiguous(), offsets.contiguous(), cap.contiguous()
    upper = None if upper is None else upper.contiguous()
    weight = None if weight is None else weight.contiguous()
    x = torch.empty_like(values)
    blocks = offsets.shape[0] - 1
    shared = upper is None or (upper.shape[0] == 1 and values.shape[0] != 1)
    sizes = (values.shape[0], blocks, int(cap.shape[0] > 1), int(not shared))
    if not _project(values, offsets, cap, upper, weight, x, *sizes, int(equality)):
        check_offsets("offsets", offsets, values.shape[0])
        raise ValueError(f"offsets: expected blocks below 2**31 variables, got one of {int(offsets.diff().max())}")
    return x
