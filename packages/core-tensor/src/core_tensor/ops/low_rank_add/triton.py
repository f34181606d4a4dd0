"""Triton kernel: a few rows of one micro-batch meet all rows of I, and what comes out meets all rows of O at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_tensor.ops._compile import CompileRow
from core_tensor.ops.low_rank_add import reference

ROWS = 16
WIDTH = 32
RANKS = (16, 32)
"""Products with I stay in registers up to the last of these; a larger rank is left to torch's batched GEMM."""


@triton.jit
def _add_kernel(
    base, x, inner, outer, coefficient, y, rows, rank, width, out_width, base_stride, bias,
    BASE: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    micro_batch = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, RANK)
    row = micro_batch * rows + i  # of x and y
    products = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, width, WIDTH):
        k = start + tl.arange(0, WIDTH)
        a = tl.load(x + row[:, None] * width + k[None, :], mask=(i[:, None] < rows) & (k[None, :] < width), other=0.0)
        at = inner + (micro_batch * rank + r[:, None]) * width + k[None, :]
        b = tl.load(at, mask=(r[:, None] < rank) & (k[None, :] < width), other=0.0)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
    products = tl.load(coefficient + micro_batch) * (products + bias)
    for start in range(0, out_width, WIDTH):
        k = start + tl.arange(0, WIDTH)
        inside = (i[:, None] < rows) & (k[None, :] < out_width)
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        if BASE:  # a stride of 0: all rows share one
            total = tl.load(base + row[:, None] * base_stride + k[None, :], mask=inside, other=0.0)
        at = outer + (micro_batch * rank + r[:, None]) * out_width + k[None, :]
        b = tl.load(at, mask=(r[:, None] < rank) & (k[None, :] < out_width), other=0.0)
        total = tl.dot(products, b, total, input_precision="ieee")
        tl.store(y + row[:, None] * out_width + k[None, :], total, mask=inside)


def low_rank_add(
    base: Tensor | None, x: Tensor, inner: Tensor, outer: Tensor, coefficient: Tensor, bias: float, out: Tensor
) -> None:
    """See `core_tensor.low_rank_add`."""
    n, rank, width = inner.shape
    if out.dtype != torch.float32 or rank > RANKS[-1] or not out.is_contiguous():
        reference.low_rank_add(base, x, inner, outer, coefficient, bias, out)
        return
    if out.numel() == 0:
        return
    rows, out_width = out.shape[0] // n, out.shape[1]
    given = [t.contiguous() for t in (out if base is None else base, x, inner, outer, coefficient)]
    stride = out_width if base is not None and base.ndim == 2 else 0
    block = next(r for r in RANKS if r >= rank)
    _add_kernel[(n, triton.cdiv(rows, ROWS))](
        *given, out, rows, rank, width, out_width, stride, float(bias), base is not None, ROWS, block, WIDTH
    )


COMPILE = [
    CompileRow(
        _add_kernel,
        {
            **dict.fromkeys(("base", "x", "inner", "outer", "coefficient", "y"), "*fp32"),
            **dict.fromkeys(("rows", "rank", "width", "out_width", "base_stride"), "i32"),
            "bias": "fp32",
        },
        {"BASE": base, "ROWS": ROWS, "RANK": rank, "WIDTH": WIDTH},
    )
    for base in (False, True)
    for rank in RANKS
]
