"""Triton kernel: one program sums one tile of the scatter over one run of rows, centred and widened as they come."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_tensor.ops._compile import CompileRow

TILE = 32
ROWS = 16
PROGRAMS = 512
"""Tiles times runs of rows, about: a narrow matrix, whose scatter has few tiles, is split into more runs."""


@triton.jit
def _scatter_kernel(
    x, shift, sums, scatter, n, d, rows_per_part,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    left, right, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if right > left:  # the scatter is symmetric: the lower triangle of tiles
        return
    i, j = left * TILE + tl.arange(0, TILE), right * TILE + tl.arange(0, TILE)
    shift_i = tl.load(shift + i, mask=i < d, other=0.0)
    shift_j = tl.load(shift + j, mask=j < d, other=0.0)
    tile = tl.zeros((TILE, TILE), tl.float64)
    total = tl.zeros((TILE,), tl.float64)
    first = part * rows_per_part
    for start in range(first, tl.minimum(first + rows_per_part, n), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < n) & (row < first + rows_per_part)
        at = row[:, None].to(tl.int64) * d
        a = tl.load(x + at + i[None, :], mask=inside[:, None] & (i[None, :] < d), other=0.0).to(tl.float64)
        b = tl.load(x + at + j[None, :], mask=inside[:, None] & (j[None, :] < d), other=0.0).to(tl.float64)
        a = tl.where(inside[:, None], a - shift_i[None, :], 0.0)
        b = tl.where(inside[:, None], b - shift_j[None, :], 0.0)
        tile = tl.dot(tl.trans(a), b, tile, out_dtype=tl.float64)
        total += tl.sum(a, axis=0)
    inside = (i[:, None] < d) & (j[None, :] < d)
    tl.store(scatter + (part.to(tl.int64) * d + i[:, None]) * d + j[None, :], tile, mask=inside)
    if left == right:
        tl.store(sums + part.to(tl.int64) * d + i, total, mask=i < d)


def centred_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `core_tensor.centred_moments`."""
    x = x.contiguous()
    n, d = x.shape
    # as on the CPU: what a shift among the rows misses of the mean is subtracted at the end, which cancels no digits
    shift = x[:256].double().mean(0)
    tiles = triton.cdiv(d, TILE)
    per_part = triton.cdiv(triton.cdiv(n, max(1, PROGRAMS // (tiles * (tiles + 1) // 2))), ROWS) * ROWS
    parts = triton.cdiv(n, per_part)
    sums = torch.empty(parts, d, dtype=torch.float64, device=x.device)
    scatter = torch.zeros(parts, d, d, dtype=torch.float64, device=x.device)
    _scatter_kernel[(tiles, tiles, parts)](x, shift, sums, scatter, n, d, per_part, TILE, ROWS)
    rest = sums.sum(0)
    lower = (scatter.sum(0) - torch.outer(rest, rest) / n).tril()
    return shift + rest / n, lower + lower.tril(-1).mT


COMPILE = [
    CompileRow(
        _scatter_kernel,
        {
            "x": name,
            **dict.fromkeys(("shift", "sums", "scatter"), "*fp64"),
            **dict.fromkeys(("n", "d", "rows_per_part"), "i32"),
        },
        {"TILE": TILE, "ROWS": ROWS},
    )
    for name in ("*fp16", "*bf16", "*fp32", "*fp64")
]
