"""Triton kernel: one program forms a pair of tiles of both Gram matrices and uses them up at once.

The matrices are symmetric, so only tiles up to the diagonal are formed, and those off it count twice. Every program
writes its share to its own slot; torch adds them up in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_tensor.ops._compile import CompileRow
from core_tensor.ops.ghost_norms import reference

TILE = 16
WIDTH = 32


@triton.jit
def _gram(a, first, second, rows, width, TILE: tl.constexpr, WIDTH: tl.constexpr):
    # Inner products of two tiles of rows.
    i, j = first + tl.arange(0, TILE), second + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, width, WIDTH):
        k = start + tl.arange(0, WIDTH)
        left = tl.load(a + i[:, None] * width + k[None, :], mask=(i[:, None] < rows) & (k[None, :] < width), other=0.0)
        right = tl.load(a + j[:, None] * width + k[None, :], mask=(j[:, None] < rows) & (k[None, :] < width), other=0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    return total


@triton.jit
def _share_kernel(
    left, right, shares, rows, left_width, right_width, tiles, bias,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    micro_batch = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    p = 0  # row of the tile in the lower triangle
    while (p + 1) * (p + 2) // 2 <= tile:
        p += 1
    q = tile - p * (p + 1) // 2
    L, R = left + micro_batch * rows * left_width, right + micro_batch * rows * right_width
    g = _gram(L, p * TILE, q * TILE, rows, left_width, TILE, WIDTH)  # zero beyond the rows
    h = _gram(R, p * TILE, q * TILE, rows, right_width, TILE, WIDTH) + bias
    share = tl.sum(tl.sum((g * h).to(tl.float64), axis=1), axis=0)
    tl.store(shares + micro_batch * tiles + tile, tl.where(p == q, share, 2 * share))


def ghost_norms(left: list[Tensor], right: list[Tensor], bias: list[float]) -> Tensor:
    """See `core_tensor.ghost_norms`."""
    if left[0].dtype != torch.float32:  # float64 is for tests
        return reference.ghost_norms(left, right, bias)
    squares = torch.zeros(left[0].shape[0], dtype=torch.float64, device=left[0].device)
    for a, b, beta in zip(left, right, bias, strict=True):
        n, rows, width = a.shape
        side = triton.cdiv(rows, TILE)
        tiles = side * (side + 1) // 2
        shares = torch.empty(n, tiles, dtype=torch.float64, device=a.device)
        _share_kernel[(n, tiles)](
            a.contiguous(), b.contiguous(), shares, rows, width, b.shape[2], tiles, beta, TILE, WIDTH
        )
        squares += shares.sum(1)
    return squares


COMPILE = [
    CompileRow(
        _share_kernel,
        {
            **dict.fromkeys(("left", "right"), "*fp32"),
            "shares": "*fp64",
            **dict.fromkeys(("rows", "left_width", "right_width", "tiles"), "i32"),
            "bias": "fp32",
        },
        {"TILE": TILE, "WIDTH": WIDTH},
    )
]
