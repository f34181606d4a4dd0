"""Call into `csrc/project_assignment.cpp`."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor._library import function

_project = function("ct_project_assignment", *[c_void_p] * 5, *[c_int64] * 3, c_int)


def project_assignment(
    values: Tensor, offsets: Tensor, slots: int, filled: bool, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `core_tensor.project_assignment`."""
    blocks = offsets.shape[0] - 1
    x = torch.empty(values.shape[0], dtype=torch.float64)
    weights = torch.empty(blocks, limit, dtype=torch.float64)
    items = torch.empty(blocks, limit, slots, dtype=torch.int32)
    _project(values.contiguous(), offsets.contiguous(), x, weights, items, blocks, slots, limit, int(filled))
    return x, weights, items
