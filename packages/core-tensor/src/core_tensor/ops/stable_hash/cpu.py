"""Call into `csrc/stable_hash.cpp`."""

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function

_stable_hash = function("ct_stable_hash", *[c_void_p] * 2, c_int64, c_int64, c_void_p, c_int64, c_void_p)


def stable_hash(values: Tensor, offsets: Tensor | None, seed: int, moduli: list[int]) -> Tensor:
    """See `core_tensor.stable_hash`."""
    values = values.contiguous()
    n = len(values) if offsets is None else len(offsets) - 1
    offsets = None if offsets is None else offsets.contiguous()
    hashes = torch.empty((n, len(moduli)), dtype=torch.int64)
    _stable_hash(values, offsets, n, seed, torch.tensor(moduli, dtype=torch.int64), len(moduli), hashes)
    return hashes
