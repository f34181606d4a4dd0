"""Call into `csrc/project_assignment.cpp`."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function
from core_tensor.ops.project_assignment import reference

_project = function("ct_project_assignment", *[c_void_p] * 5, *[c_int64] * 4, c_int, returns=c_int)


def project_assignment(
    values: Tensor, offsets: Tensor, slots: int, filled: bool, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `core_tensor.project_assignment`."""
    values, offsets = values.contiguous(), offsets.contiguous()
    variables, blocks = values.shape[0], offsets.shape[0] - 1
    x = torch.empty(variables, dtype=torch.float64)
    weights = torch.empty(blocks, limit, dtype=torch.float64)
    items = torch.empty(blocks, limit, slots, dtype=torch.int32)
    done = _project(values, offsets, x, weights, items, variables, blocks, slots, limit, filled)
    if done < 0:
        raise MemoryError(f"project_assignment: too little memory for blocks of {slots} slots")
    if not done:
        reference.check(values, offsets, slots, filled)  # says what the kernel has refused
        raise AssertionError("project_assignment: the kernel refused what the reference accepts")
    return x, weights, items
