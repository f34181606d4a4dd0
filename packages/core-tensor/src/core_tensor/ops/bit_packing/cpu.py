"""Calls into `csrc/bit_packing.cpp`."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function
from core_tensor.ops.bit_packing import reference

_pack_bits = function("ct_pack_bits", c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int, returns=c_int)
_unpack_bits = function("ct_unpack_bits", c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """See `core_tensor.pack_bits`."""
    codes = codes.contiguous()
    rows, columns = codes.shape
    words = torch.empty((rows, -(-columns * bits // 32)), dtype=torch.int32)
    if not _pack_bits(codes, words, rows, columns, words.shape[1], bits):
        reference.check_codes(codes, bits)
    return words


def unpack_bits(words: Tensor, bits: int, columns: int) -> Tensor:
    """See `core_tensor.unpack_bits`."""
    words = words.contiguous()
    codes = torch.empty((words.shape[0], columns), dtype=torch.uint8)
    _unpack_bits(words, codes, words.shape[0], columns, words.shape[1], bits)
    return codes
