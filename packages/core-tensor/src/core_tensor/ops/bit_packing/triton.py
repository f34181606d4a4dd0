"""Triton kernels: one program packs (unpacks) `BLOCK` words (codes) of one row, each found by its own bit offset."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_tensor.ops._compile import CompileRow
from core_tensor.ops.bit_packing import reference

BLOCK = 256


@triton.jit
def _pack_kernel(codes, words, columns, words_per_row, bits: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = word * 32 // bits  # the first code with a bit in this word
    value = tl.zeros((BLOCK,), tl.uint32)
    for i in tl.static_range((31 + bits) // bits + 1):
        code = first + i
        shift = code * bits - word * 32  # in (-bits, 32]; a negative shift keeps the code's high bits
        inside = (code < columns) & (word < words_per_row) & (shift < 32)
        c = tl.load(codes + row * columns + code, mask=inside, other=0).to(tl.uint32)
        left = c << tl.maximum(tl.minimum(shift, 31), 0).to(tl.uint32)
        right = c >> tl.maximum(-shift, 0).to(tl.uint32)
        value = value | tl.where(shift >= 0, left, right)
    tl.store(words + row * words_per_row + word, value.to(tl.int32, bitcast=True), mask=word < words_per_row)


@triton.jit
def _unpack_kernel(words, codes, columns, words_per_row, bits: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    code = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = code < columns
    word = code * bits // 32
    shift = (code * bits % 32).to(tl.uint32)
    low = tl.load(words + row * words_per_row + word, mask=inside, other=0).to(tl.uint32, bitcast=True)
    straddles = inside & (shift + bits > 32)
    high = tl.load(words + row * words_per_row + word + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True)
    value = (low >> shift) | tl.where(straddles, high << ((32 - shift) & 31), 0)
    tl.store(codes + row * columns + code, (value & ((1 << bits) - 1)).to(tl.uint8), mask=inside)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """See `core_tensor.pack_bits`."""
    reference.check_codes(codes, bits)
    codes = codes.contiguous()
    rows, columns = codes.shape
    words = torch.empty((rows, -(-columns * bits // 32)), dtype=torch.int32, device=codes.device)
    if words.numel():
        _pack_kernel[(rows, triton.cdiv(words.shape[1], BLOCK))](codes, words, columns, words.shape[1], bits, BLOCK)
    return words


def unpack_bits(words: Tensor, bits: int, columns: int) -> Tensor:
    """See `core_tensor.unpack_bits`."""
    words = words.contiguous()
    codes = torch.empty((words.shape[0], columns), dtype=torch.uint8, device=words.device)
    if codes.numel():
        _unpack_kernel[(words.shape[0], triton.cdiv(columns, BLOCK))](
            words, codes, columns, words.shape[1], bits, BLOCK
        )
    return codes


COMPILE = [
    CompileRow(
        kernel,
        {source: ty, target: to, "columns": "i32", "words_per_row": "i32"},
        {"bits": bits, "BLOCK": BLOCK},
    )
    for bits in (1, 3, 4, 8)
    for kernel, source, ty, target, to in (
        (_pack_kernel, "codes", "*u8", "words", "*i32"),
        (_unpack_kernel, "words", "*i32", "codes", "*u8"),
    )
]
