r"""Dense bit streams of 1 to 8 bit codes, the storage of `compressed-tensors` `pack-quantized` weights.

Row $i$ of the packed matrix is the little-endian bit stream

$$ \text{stream}_i = \sum_j c_{ij} \, 2^{j b}, \qquad
\text{word}_{ik} = \lfloor \text{stream}_i / 2^{32 k} \rfloor \bmod 2^{32}, $$

so a code may straddle two words and no bit is wasted except at the end of a row.
"""

import torch
from torch import Tensor

from core_tensor.checks import check_number, check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.bit_packing import cpu, reference


def _words(columns: int, bits: int) -> int:
    return -(-columns * bits // 32)


def _fake_pack(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((codes.shape[0], _words(codes.shape[1], bits)), dtype=torch.int32)


def _fake_unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    return words.new_empty((words.shape[0], columns), dtype=torch.uint8)


_pack = operator(
    "pack_bits(Tensor codes, int bits) -> Tensor",
    reference=reference.pack_bits,
    fake=_fake_pack,
    cpu=cpu.pack_bits,
    cuda="core_tensor.ops.bit_packing.triton:pack_bits",
)
_unpack = operator(
    "unpack_bits(Tensor words, int bits, int columns) -> Tensor",
    reference=reference.unpack_bits,
    fake=_fake_unpack,
    cpu=cpu.unpack_bits,
    cuda="core_tensor.ops.bit_packing.triton:unpack_bits",
)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes of `bits` bits into 32-bit words, row by row.

    Args:
        codes: Codes in `[0, 2**bits - 1]`, shape (rows, columns), uint8. Larger values are refused.
        bits: Bits per code, 1 to 8.

    Returns:
        Words, shape (rows, ceil(columns * bits / 32)), int32; unused high bits of the last word are zero.

    Raises:
        ValueError: If the shape, the number of bits or a code is out of range.
        TypeError: If `codes` is not uint8, or `bits` not an int.
    """
    check_tensor("codes", codes, ndim=2, dtype=torch.uint8)
    check_number("bits", bits, low=1, high=8, integer=True)
    packed: Tensor = _pack(codes, bits)
    return packed


def unpack_bits(words: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_bits`.

    Args:
        words: Packed words, shape (rows, ceil(columns * bits / 32)), int32.
        bits: Bits per code, 1 to 8.
        columns: Codes per row.

    Returns:
        Codes, shape (rows, columns), uint8.

    Raises:
        ValueError: If `bits` or `columns` is out of range, or the shape does not fit them.
        TypeError: If `words` is not int32, or a number is not an int.
    """
    check_tensor("words", words, ndim=2, dtype=torch.int32)
    check_number("bits", bits, low=1, high=8, integer=True)
    check_number("columns", columns, low=0, integer=True)
    if words.shape[1] != _words(columns, bits):
        raise ValueError(
            f"words: expected {_words(columns, bits)} words per row for {columns} codes of {bits} bits, "
            f"got {words.shape[1]}"
        )
    codes: Tensor = _unpack(words, bits, columns)
    return codes
