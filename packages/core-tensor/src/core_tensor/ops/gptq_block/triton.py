"""Triton kernel: as in `cd_block`, one program takes `COLUMNS` out features through the block."""

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
def _gptq_kernel(
    weight, lower, scale, zero, group, quantized, error, size, columns, lower_stride, max_code,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    row = tl.arange(0, ROWS)
    errors = tl.zeros((ROWS, COLUMNS), weight.dtype.element_ty)
    for j in range(size):
        at = j * columns.to(tl.int64) + column
        before = tl.load(lower + j * lower_stride + row, mask=row < j, other=0.0)
        diagonal = tl.load(lower + j * lower_stride + j)
        w = tl.load(weight + at, mask=inside, other=0.0) - tl.sum(before[:, None] * errors, axis=0)
        grid = tl.load(group + j) * columns + column
        s = tl.load(scale + grid, mask=inside, other=1.0)
        z = tl.load(zero + grid, mask=inside, other=0.0)
        value = quantize(w, s, z, max_code)
        e = (w - value) / diagonal
        tl.store(quantized + at, value, mask=inside)
        tl.store(error + at, e, mask=inside)
        errors = tl.where(row[:, None] == j, e[None, :], errors)


def gptq_block(
    weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, group: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """See `core_tensor.gptq_block`."""
    check_indices("group", group, scale.shape[0])
    lower = factor.T.contiguous()  # row j holds U_kj for k <= j
    weight, scale, zero, group = (t.contiguous() for t in (weight, scale, zero, group))
    quantized, error = torch.empty_like(weight), torch.empty_like(weight)
    columns = weight.shape[1]
    if columns == 0:
        return quantized, error
    for start in range(0, weight.shape[0], ROWS):
        part = slice(start, min(start + ROWS, weight.shape[0]))
        base = torch.addmm(weight[part], lower[part, :start], error[:start], alpha=-1)
        _gptq_kernel[(triton.cdiv(columns, COLUMNS),)](
            base, lower[part, start:], scale, zero, group[part], quantized[part], error[part],
            base.shape[0], columns, lower.shape[1], float(max_code), ROWS, COLUMNS,
        )  # fmt: skip
    return quantized, error


COMPILE = [
    CompileRow(
        _gptq_kernel,
        {
            **dict.fromkeys(("weight", "lower", "scale", "zero", "quantized", "error"), "*fp32"),
            "group": "*i64",
            **dict.fromkeys(("size", "columns", "lower_stride"), "i32"),
            "max_code": "fp32",
        },
        {"ROWS": ROWS, "COLUMNS": COLUMNS},
    )
]
