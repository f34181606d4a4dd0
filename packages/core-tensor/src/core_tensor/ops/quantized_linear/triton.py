"""Triton kernels: a tiled product that unpacks each tile of codes in registers, and one that adds the outliers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_tensor.ops._compile import CompileRow

ROWS = 32
FEATURES = {torch.float32: 16, torch.bfloat16: 32, torch.float16: 32}  # float32 products would spill at 32


@triton.jit
def _linear_kernel(
    x, words, scale, zero, y, tokens, rows, features, words_per_row, groups, group_size, bits,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, features, FEATURES):
        j = start + tl.arange(0, FEATURES)
        inside = (row[:, None] < rows) & (j[None, :] < features)
        word = words + row[:, None].to(tl.int64) * words_per_row + (j * bits // 32)[None, :]
        shift = (j * bits % 32).to(tl.uint32)[None, :]
        low = tl.load(word, mask=inside, other=0).to(tl.uint32, bitcast=True)
        straddles = inside & (shift + bits > 32)
        high = tl.load(word + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True)
        code = ((low >> shift) | tl.where(straddles, high << ((32 - shift) & 31), 0)) & ((1 << bits) - 1)
        at = row[:, None].to(tl.int64) * groups + (j // group_size)[None, :]
        s = tl.load(scale + at, mask=inside, other=0.0)
        z = tl.load(zero + at, mask=inside, other=0).to(tl.float32)
        weight = s * (code.to(tl.float32) - z)  # (ROWS, FEATURES)
        seen = (token[:, None] < tokens) & (j[None, :] < features)
        value = tl.load(x + token[:, None].to(tl.int64) * features + j[None, :], mask=seen, other=0.0)
        if x.dtype.element_ty == tl.float32:
            total = tl.dot(value, tl.trans(weight), total, input_precision="ieee")
        else:
            total = tl.dot(value, tl.trans(weight.to(value.dtype)), total)
    target = y + token[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(target, total, mask=(token[:, None] < tokens) & (row[None, :] < rows))


@triton.jit
def _outlier_kernel(x, offsets, columns, values, y, tokens, rows, features, outliers, TOKENS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    seen = token < tokens
    total = tl.zeros((TOKENS,), tl.float32)
    # Outliers that nobody has checked cannot make it read outside the arrays.
    begin = tl.maximum(tl.load(offsets + row), 0)
    for k in range(begin, tl.minimum(tl.load(offsets + row + 1), outliers)):
        column = tl.full((TOKENS,), 0, tl.int32) + tl.load(columns + k)
        at = x + token.to(tl.int64) * features + column
        inside = seen & (column >= 0) & (column < features)
        total += tl.load(values + k) * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    target = y + token.to(tl.int64) * rows + row
    tl.store(target, tl.load(target, mask=seen, other=0.0) + total, mask=seen)


def quantized_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    offsets: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
) -> Tensor:
    """See `core_tensor.quantized_linear`."""
    x, words, scale, zero = x.contiguous(), words.contiguous(), scale.float().contiguous(), zero.contiguous()
    (tokens, features), rows = x.shape, words.shape[0]
    y = torch.zeros(tokens, rows, device=x.device)
    if tokens == 0 or rows == 0 or features == 0:
        return y.to(x.dtype)
    block = max(16, min(64, triton.next_power_of_2(tokens)))
    _linear_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(tokens, block))](
        x, words, scale, zero, y, tokens, rows, features, words.shape[1], scale.shape[1], group_size, bits,
        block, ROWS, FEATURES[x.dtype],
    )  # fmt: skip
    if offsets is not None and columns is not None and values is not None:
        _outlier_kernel[(rows, triton.cdiv(tokens, block))](
            x, offsets.contiguous(), columns.contiguous(), values.float().contiguous(), y,
            tokens, rows, features, columns.shape[0], block,
        )  # fmt: skip
    return y.to(x.dtype)


_SIGNATURE = {
    "words": "*i32",
    "scale": "*fp32",
    "zero": "*u8",
    "y": "*fp32",
    **dict.fromkeys(("tokens", "rows", "features", "words_per_row", "groups", "group_size", "bits"), "i32"),
}
COMPILE = [
    CompileRow(
        _linear_kernel,
        {"x": name, **_SIGNATURE},
        {"TOKENS": tokens, "ROWS": ROWS, "FEATURES": FEATURES[dtype]},
    )
    for name, dtype in (("*fp32", torch.float32), ("*bf16", torch.bfloat16), ("*fp16", torch.float16))
    for tokens in (16, 64)
] + [
    CompileRow(
        _outlier_kernel,
        {
            "x": "*fp32",
            "offsets": "*i64",
            "columns": "*i32",
            "values": "*fp32",
            "y": "*fp32",
            **dict.fromkeys(("tokens", "rows", "features", "outliers"), "i32"),
        },
        {"TOKENS": 64},
    )
]
