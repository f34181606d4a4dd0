"""Triton kernel: one program takes `COLUMNS` out features through the block, their changes held in registers.

Blocks of more than `ROWS` features are split, with a GEMM between the parts: that bounds the registers, and the part of
the work that grows with the square of the block goes to the tensor cores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_tensor.checks import check_indices
from core_tensor.ops._compile import CompileRow
from core_tensor.ops._triton_math import quantize

ROWS = 64
COLUMNS = 32


@triton.jit
def _cd_kernel(
    correction, weight, residual, sigma, scale, zero, group, mask, updated, size, columns, sigma_stride, max_code,
    QUANTIZE: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    row = tl.arange(0, ROWS)
    delta = tl.zeros((ROWS, COLUMNS), weight.dtype.element_ty)
    for j in range(size):
        at = j * columns.to(tl.int64) + column
        lower = tl.load(sigma + j * sigma_stride + row, mask=row < j, other=0.0)
        w = tl.load(weight + at, mask=inside, other=0.0)
        value = w + tl.load(correction + at, mask=inside, other=0.0) + tl.sum(lower[:, None] * delta, axis=0)
        if QUANTIZE:
            grid = tl.load(group + j) * columns + column
            s = tl.load(scale + grid, mask=inside, other=1.0)
            z = tl.load(zero + grid, mask=inside, other=0.0)
            rounded = quantize(value, s, z, max_code)
            if MASKED:
                rounded = tl.where(tl.load(mask + at, mask=inside, other=0) != 0, value, rounded)
            value = rounded
        fresh = w - value
        change = fresh - tl.load(residual + at, mask=inside, other=0.0)
        tl.store(updated + at, fresh, mask=inside)
        delta = tl.where(row[:, None] == j, change[None, :], delta)


def cd_block(
    correction: Tensor,
    weight: Tensor,
    residual: Tensor,
    sigma: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    mask: Tensor | None,
    max_code: int,
    quantize: bool,
) -> Tensor:
    """See `core_tensor.cd_block`."""
    check_indices("group", group, scale.shape[0])
    correction, weight, residual, sigma = (t.contiguous() for t in (correction, weight, residual, sigma))
    scale, zero, group = scale.contiguous(), zero.contiguous(), group.contiguous()
    flags = None if mask is None else mask.contiguous().view(torch.uint8)
    updated = torch.empty_like(weight)
    columns = weight.shape[1]
    if columns == 0:
        return updated
    for start in range(0, weight.shape[0], ROWS):
        part = slice(start, min(start + ROWS, weight.shape[0]))
        head = slice(0, start)
        base = torch.addmm(correction[part], sigma[part, head], updated[head] - residual[head])
        _cd_kernel[(triton.cdiv(columns, COLUMNS),)](
            base, weight[part], residual[part], sigma[part, start:], scale, zero, group[part],
            weight if flags is None else flags[part], updated[part],
            base.shape[0], columns, sigma.shape[1], float(max_code),
            quantize, flags is not None, ROWS, COLUMNS,
        )  # fmt: skip
    return updated


COMPILE = [
    CompileRow(
        _cd_kernel,
        {
            **dict.fromkeys(("correction", "weight", "residual", "sigma", "scale", "zero", "updated"), f"*{dtype}"),
            "group": "*i64",
            "mask": "*u8",
            **dict.fromkeys(("size", "columns", "sigma_stride"), "i32"),
            "max_code": "fp32",
        },
        {"QUANTIZE": quantize, "MASKED": masked, "ROWS": ROWS, "COLUMNS": COLUMNS},
    )
    for dtype, quantize, masked in (("fp32", True, False), ("fp32", True, True), ("fp32", False, False))
]
