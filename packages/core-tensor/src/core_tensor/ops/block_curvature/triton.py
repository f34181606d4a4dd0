"""Triton kernels: where every cut is tight, then the sum over pairs of nonzeros of each $A_i$'s free columns.

torch lists the free variables in between, so that pairs are taken among them only: most blocks have few or none. Every
term is rounded to fixed point before it is added, so that the order of the atomics cannot change a result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_tensor.ops._compile import CompileRow
from core_tensor.ops._triton_math import fixed_point

CHUNK = 128
TILE = 16
"""Nonzeros of a block that one program pairs with all of the block's, so many at a time: blocks may have any length."""


@triton.jit
def _cut_kernel(
    x, offsets, caps, weight, free, bounds, square, cap_stride,
    EQUALITY: tl.constexpr, WEIGHT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # w_F'w_F where the cut is tight, else 0.
    block = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(bounds + block), tl.load(bounds + block + 1)
    norm = tl.full((), 0.0, tl.float64)
    if end > begin:
        tight = end > begin  # as equations always are
        if not EQUALITY:
            total = tl.full((), 0.0, tl.float64)
            last = tl.load(offsets + block + 1)
            for start in range(tl.load(offsets + block), last, CHUNK):
                k = start + tl.arange(0, CHUNK)
                load = tl.load(x + k, mask=k < last, other=0.0)
                if WEIGHT:
                    load = load * tl.load(weight + k, mask=k < last, other=0.0).to(tl.float64)
                total += tl.sum(load, axis=0)
            tight = total >= tl.load(caps + block * cap_stride) * (1.0 - 1e-12)
        if tight:
            norm = (end - begin).to(tl.float64)
            if WEIGHT:
                norm = tl.full((), 0.0, tl.float64)
                for start in range(begin, end, CHUNK):
                    i = start + tl.arange(0, CHUNK)
                    k = tl.load(free + i, mask=i < end, other=0)
                    w = tl.load(weight + k, mask=i < end, other=0.0).to(tl.float64)
                    norm += tl.sum(w * w, axis=0)
    tl.store(square + block, norm)


@triton.jit
def _nonzeros(
    free, index, coefficient, weight, begin, first, count, K,
    COEFFICIENT: tl.constexpr, WEIGHT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Variable, row, value and weight of a run of nonzeros of A_F; `count` is how many the block has.
    i = first + tl.arange(0, TILE)
    inside = i < count
    k = tl.load(free + begin + i // K, mask=inside, other=0)
    at = k * K + i % K
    row = tl.load(index + at, mask=inside, other=0).to(tl.int64)
    a = tl.full((TILE,), 1.0, tl.float64)
    if COEFFICIENT:
        a = tl.load(coefficient + at, mask=inside, other=0.0).to(tl.float64)
    w = tl.full((TILE,), 1.0, tl.float64)
    if WEIGHT:
        w = tl.load(weight + k, mask=inside, other=0.0).to(tl.float64)
    return k, row, a, w, inside


@triton.jit
def _pair_kernel(
    owner, programs_before, free, bounds, square, index, coefficient, weight, scale, out, rows, K,
    COEFFICIENT: tl.constexpr, WEIGHT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    block = tl.load(owner + program)
    begin = tl.load(bounds + block)
    count = (tl.load(bounds + block + 1) - begin) * K
    factor = tl.load(scale)
    k, row, a, w, inside = _nonzeros(
        free, index, coefficient, weight, begin, (program - tl.load(programs_before + block)) * TILE, count, K,
        COEFFICIENT, WEIGHT, TILE,
    )  # fmt: skip
    for e in range(K):  # the identity: pairs of one variable
        other = tl.load(index + k * K + e, mask=inside, other=0)
        value = a
        if COEFFICIENT:
            value = a * tl.load(coefficient + k * K + e, mask=inside, other=0.0).to(tl.float64)
        tl.atomic_add(out + row * rows + other, fixed_point(value, factor), mask=inside, sem="relaxed")
    norm = tl.load(square + block)
    if norm > 0.0:
        left = -w / norm
        for start in range(0, count, TILE):
            _, other, b, v, beside = _nonzeros(
                free, index, coefficient, weight, begin, start, count, K, COEFFICIENT, WEIGHT, TILE
            )  # fmt: skip
            value = left[:, None] * v[None, :] * a[:, None] * b[None, :]
            tl.atomic_add(
                out + row[:, None] * rows + other[None, :], fixed_point(value, factor),
                mask=inside[:, None] & beside[None, :], sem="relaxed",
            )  # fmt: skip


def block_curvature(
    offsets: Tensor,
    index: Tensor,
    coefficient: Tensor | None,
    x: Tensor,
    cap: Tensor,
    upper: Tensor | None,
    weight: Tensor | None,
    equality: bool,
    rows: int,
    scale: float,
) -> Tensor:
    """See `core_tensor.block_curvature`."""
    result = torch.zeros(rows, rows, dtype=torch.int64, device=x.device)
    blocks, per_variable = offsets.shape[0] - 1, index.shape[1] if index.ndim == 2 else 1
    if blocks == 0:
        return result
    x, index, cap, local = x.contiguous(), index.contiguous(), cap.contiguous(), offsets - offsets[0]
    a, w = (x if t is None else t.contiguous() for t in (coefficient, weight))
    free = torch.nonzero((x > 0) if upper is None else (x > 0) & (x < upper)).ravel()
    bounds = torch.searchsorted(free, local)  # where each block's free variables are in their list
    square = torch.empty(blocks, dtype=torch.float64, device=x.device)
    _cut_kernel[(blocks,)](
        x, local, cap, w, free, bounds, square, int(cap.shape[0] > 1), equality, weight is not None, CHUNK, num_warps=1
    )
    owner, before = _programs(bounds, square, per_variable)
    if owner.shape[0]:
        # As a tensor: Triton passes a Python float to a kernel in single precision.
        factor = torch.full((1,), scale, dtype=torch.float64, device=x.device)
        _pair_kernel[(owner.shape[0],)](
            owner, before, free, bounds, square, index, a, w, factor, result, rows, per_variable,
            coefficient is not None, weight is not None, TILE, num_warps=1,
        )  # fmt: skip
    return result


def _programs(bounds: Tensor, square: Tensor, per_variable: int) -> tuple[Tensor, Tensor]:
    """The block of every program of `_pair_kernel`, and how many programs precede those of each block."""
    count = bounds[1:] - bounds[:-1]
    vertex = (count == 1) & (square > 0)  # one free variable and a tight cut: nothing moves
    programs = torch.where(vertex, 0, (count * per_variable + TILE - 1) // TILE)
    owner = torch.repeat_interleave(torch.arange(programs.shape[0], device=programs.device), programs)
    return owner, programs.cumsum(0) - programs


COMPILE = [
    CompileRow(
        _cut_kernel,
        {
            **dict.fromkeys(("x", "caps", "square"), "*fp64"),
            **dict.fromkeys(("offsets", "free", "bounds"), "*i64"),
            "weight": data,
            "cap_stride": "i32",
        },
        {"EQUALITY": equality, "WEIGHT": weighted, "CHUNK": CHUNK},
        num_warps=1,
    )
    for equality in (False, True)
    for data, weighted in (("*fp64", False), ("*fp32", True), ("*fp64", True))
] + [
    CompileRow(
        _pair_kernel,
        {
            **dict.fromkeys(("owner", "programs_before", "free", "bounds", "out"), "*i64"),
            **dict.fromkeys(("square", "scale"), "*fp64"),
            **dict.fromkeys(("coefficient", "weight"), data),
            "index": "*i32",
            **dict.fromkeys(("rows", "K"), "i32"),
        },
        {"COEFFICIENT": coefficient, "WEIGHT": weighted, "TILE": TILE, **one},
        num_warps=1,
    )
    for one in ({}, {"K": 1})  # as Triton does with arguments that are 1
    for data in ("*fp32", "*fp64")
    for coefficient, weighted in ((False, False), (True, False), (True, True))
]
