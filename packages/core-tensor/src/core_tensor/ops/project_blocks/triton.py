"""Triton kernel: one program projects one block, in chunks, by bisection on the multiplier and an exact last step."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_tensor.checks import check_offsets
from core_tensor.ops._compile import CompileRow

CHUNK = 128
HALVINGS = 100
"""Bisections: from any bracket of float64 numbers down to neighbors, or to a piece without a kink inside."""


@triton.jit
def _load_block(
    values, upper, weight, at, inside, cap, upper_stride, UPPER: tl.constexpr, WEIGHT: tl.constexpr
):  # fmt: skip
    # Point, own bound min(u, d / w) and weight of a run of variables; neutral outside the block.
    v = tl.load(values + at, mask=inside, other=0.0).to(tl.float64)
    w = tl.full(at.shape, 1.0, tl.float64)
    if WEIGHT:
        w = tl.load(weight + at, mask=inside, other=1.0).to(tl.float64)
    u = cap / w
    if UPPER:
        u = tl.minimum(u, tl.load(upper + at * upper_stride, mask=inside, other=0.0).to(tl.float64))
    return v, tl.where(inside, u, 0.0), w


@triton.jit
def _cut_multiplier(
    values, upper, weight, first, n, cap, upper_stride,
    EQUALITY: tl.constexpr, UPPER: tl.constexpr, WEIGHT: tl.constexpr, CHUNK: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    # theta with w'clip(v - theta w, 0, u) = d; zero where the cut does not bind.
    low = tl.full((), float("inf"), tl.float64)
    high = tl.full((), float("-inf"), tl.float64)
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, n, CHUNK):
        k = start + tl.arange(0, CHUNK)
        inside = k < n
        v, u, w = _load_block(values, upper, weight, first + k, inside, cap, upper_stride, UPPER, WEIGHT)
        low = tl.minimum(low, tl.min(tl.where(inside, (v - u) / w, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(inside, v / w, float("-inf")), axis=0))
        total += tl.sum(tl.where(inside, w * tl.minimum(tl.maximum(v, 0.0), u), 0.0), axis=0)
    cut = total > cap
    if EQUALITY:
        cut = total != cap
    else:
        low = tl.maximum(low, 0.0)
    theta = tl.full((), 0.0, tl.float64)
    if cut & (n > 0):
        for _ in range(HALVINGS):
            middle = low + (high - low) / 2
            total = tl.full((), 0.0, tl.float64)
            for start in range(0, n, CHUNK):
                k = start + tl.arange(0, CHUNK)
                inside = k < n
                v, u, w = _load_block(values, upper, weight, first + k, inside, cap, upper_stride, UPPER, WEIGHT)
                x = tl.minimum(tl.maximum(v - middle * w, 0.0), u)
                total += tl.sum(tl.where(inside, w * x, 0.0), axis=0)
            over = total > cap
            low = tl.where(over, middle, low)
            high = tl.where(over, high, middle)
        theta = low + (high - low) / 2
        rest = tl.full((), 0.0, tl.float64)  # the exact root of the piece that bisection has found
        square = tl.full((), 0.0, tl.float64)
        for start in range(0, n, CHUNK):
            k = start + tl.arange(0, CHUNK)
            inside = k < n
            v, u, w = _load_block(values, upper, weight, first + k, inside, cap, upper_stride, UPPER, WEIGHT)
            x = v - theta * w
            free = inside & (x > 0.0) & (x < u)
            rest += tl.sum(tl.where(free, w * v, tl.where(inside & (x >= u), w * u, 0.0)), axis=0)
            square += tl.sum(tl.where(free, w * w, 0.0), axis=0)
        theta = tl.where(square > 0.0, (rest - cap) / tl.where(square > 0.0, square, 1.0), theta)
    return theta


@triton.jit
def _project_kernel(
    values, offsets, caps, upper, weight, out, cap_stride, upper_stride,
    EQUALITY: tl.constexpr, UPPER: tl.constexpr, WEIGHT: tl.constexpr, CHUNK: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + block)
    n = (tl.load(offsets + block + 1) - first).to(tl.int32)
    cap = tl.load(caps + block * cap_stride)
    theta = _cut_multiplier(
        values, upper, weight, first, n, cap, upper_stride, EQUALITY, UPPER, WEIGHT, CHUNK, HALVINGS
    )  # fmt: skip
    for start in range(0, n, CHUNK):
        k = start + tl.arange(0, CHUNK)
        inside = k < n
        v, u, w = _load_block(values, upper, weight, first + k, inside, cap, upper_stride, UPPER, WEIGHT)
        tl.store(out + first + k, tl.minimum(tl.maximum(v - theta * w, 0.0), u), mask=inside)


def project_blocks(
    values: Tensor, offsets: Tensor, cap: Tensor, upper: Tensor | None, weight: Tensor | None, equality: bool
) -> Tensor:
    """See `core_tensor.project_blocks`."""
    check_offsets("offsets", offsets, values.shape[0])
    values, offsets, cap = values.contiguous(), offsets.contiguous(), cap.contiguous()
    x = torch.empty_like(values)
    blocks = offsets.shape[0] - 1
    shared = upper is None or (upper.shape[0] == 1 and values.shape[0] != 1)
    if blocks:
        _project_kernel[(blocks,)](
            values, offsets, cap,
            values if upper is None else upper.contiguous(),
            values if weight is None else weight.contiguous(),
            x, int(cap.shape[0] > 1), int(not shared),
            equality, upper is not None, weight is not None, CHUNK, HALVINGS,
        )  # fmt: skip
    return x


COMPILE = [
    CompileRow(
        _project_kernel,
        {
            "values": "*fp64",
            "offsets": "*i64",
            **dict.fromkeys(("caps", "upper", "weight", "out"), "*fp64"),
            **dict.fromkeys(("cap_stride", "upper_stride"), "i32"),
        },
        {"EQUALITY": equality, "UPPER": upper, "WEIGHT": weight, "CHUNK": CHUNK, "HALVINGS": HALVINGS},
        num_warps=1,
    )
    for equality, upper, weight in ((False, False, False), (True, False, False), (False, True, True))
]
