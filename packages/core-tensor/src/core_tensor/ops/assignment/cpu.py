"""Call into `csrc/assignment.cpp`."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function

_assignment = function("ct_assignment", c_void_p, c_void_p, c_int64, c_int64, returns=c_int)


def assignment(cost: Tensor) -> Tensor:
    """See `core_tensor.assignment`."""
    cost = cost.contiguous()
    columns = torch.empty(cost.shape[:2], dtype=torch.int64)
    if not _assignment(cost, columns, *cost.shape[:2]):
        raise ValueError("cost: expected finite values, got NaN or an infinite one")
    return columns
