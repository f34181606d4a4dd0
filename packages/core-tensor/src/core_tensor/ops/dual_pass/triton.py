"""Triton kernel: one program takes a run of blocks in turn, each held in registers; sums are atomic whole numbers.

The multiplier of a cut and the least value are found by bisection in registers, the former with an exact last step.
Every term is rounded to fixed point before it is added, so that the order of the atomics cannot change a result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_tensor.ops._compile import CompileRow
from core_tensor.ops._triton_math import fixed_point
from core_tensor.ops.dual_pass import reference

WIDTHS = (16, 128, 1024)
"""Registers hold blocks of up to so many variables; a problem with a longer block is left to the reference."""
HALVINGS = 100
PER_PROGRAM = 32


@triton.jit
def _reduced_cost(index, cost, coefficient, lam, at, inside, COEFFICIENT: tl.constexpr, K: tl.constexpr):
    r = tl.load(cost + at, mask=inside, other=0.0).to(tl.float64)
    for i in tl.static_range(K):
        price = tl.load(lam + tl.load(index + at * K + i, mask=inside, other=0), mask=inside, other=0.0)
        if COEFFICIENT:
            price = price * tl.load(coefficient + at * K + i, mask=inside, other=0.0).to(tl.float64)
        r += price
    return r


@triton.jit
def _cut_multiplier(v, u, w, cap, inside, EQUALITY: tl.constexpr, HALVINGS: tl.constexpr):
    # theta with w'clip(v - theta w, 0, u) = d; zero where the cut does not bind.
    low = tl.min(tl.where(inside, (v - u) / w, float("inf")), axis=0)
    high = tl.max(tl.where(inside, v / w, float("-inf")), axis=0)
    total = tl.sum(tl.where(inside, w * tl.minimum(tl.maximum(v, 0.0), u), 0.0), axis=0)
    if EQUALITY:
        cut = total != cap
    else:
        cut = total > cap
        low = tl.maximum(low, 0.0)
    theta = total * 0.0
    if cut:
        for _ in range(HALVINGS):
            middle = low + (high - low) / 2
            x = tl.minimum(tl.maximum(v - middle * w, 0.0), u)
            over = tl.sum(tl.where(inside, w * x, 0.0), axis=0) > cap
            low = tl.where(over, middle, low)
            high = tl.where(over, high, middle)
        theta = low + (high - low) / 2
        x = v - theta * w
        free = inside & (x > 0.0) & (x < u)  # the piece that bisection has found; its root is exact
        rest = tl.sum(tl.where(free, w * v, tl.where(inside & (x >= u), w * u, 0.0)), axis=0) - cap
        square = tl.sum(tl.where(free, w * w, 0.0), axis=0)
        theta = tl.where(square > 0.0, rest / tl.where(square > 0.0, square, 1.0), theta)
    return theta


@triton.jit
def _least_value(r, u, w, cap, inside, EQUALITY: tl.constexpr, HALVINGS: tl.constexpr):
    # min r'v over the block = max over theta of sum u min(r + theta w, 0) - theta d, concave and piecewise linear.
    high = tl.maximum(tl.max(tl.where(inside, -r / w, float("-inf")), axis=0), 0.0)
    low = high * 0.0
    total = tl.sum(tl.where(inside & (r < 0.0), w * u, 0.0), axis=0)
    if EQUALITY:
        cut = total >= 0.0
        low = tl.min(tl.where(inside, -r / w, float("inf")), axis=0)
        high = tl.max(tl.where(inside, -r / w, float("-inf")), axis=0)
    else:
        cut = total > cap
    if cut:
        for _ in range(HALVINGS):
            middle = low + (high - low) / 2
            over = tl.sum(tl.where(inside & (r + middle * w < 0.0), w * u, 0.0), axis=0) > cap
            low = tl.where(over, middle, low)
            high = tl.where(over, high, middle)
        at_high = tl.sum(tl.where(inside, u * tl.minimum(r + high * w, 0.0), 0.0), axis=0) - high * cap
        at_low = tl.sum(tl.where(inside, u * tl.minimum(r + low * w, 0.0), 0.0), axis=0) - low * cap
        value = tl.maximum(at_high, at_low)
    else:
        value = tl.sum(tl.where(inside, u * tl.minimum(r, 0.0), 0.0), axis=0)
    return value


@triton.jit
def _pass_kernel(
    chosen, offsets, index, cost, coefficient, lam, caps, upper, weight, anchor, shrink, scale, sums, out,
    gamma, base, count, rows, cap_stride, upper_stride, per_program,
    EQUALITY: tl.constexpr, COEFFICIENT: tl.constexpr, UPPER: tl.constexpr, WEIGHT: tl.constexpr,
    ANCHOR: tl.constexpr, SHRINK: tl.constexpr, PRIMAL: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    ridge = tl.load(gamma)
    begin = tl.program_id(0) * per_program
    for i in range(begin, tl.minimum(begin + per_program, count)):
        block = tl.load(chosen + i)
        first = tl.load(offsets + block)
        k = tl.arange(0, WIDTH)
        inside = k < tl.load(offsets + block + 1) - first
        at = first - base + k
        cap = tl.load(caps + block * cap_stride)
        w = tl.full((WIDTH,), 1.0, tl.float64)
        if WEIGHT:
            w = tl.load(weight + at, mask=inside, other=1.0).to(tl.float64)
        u = cap / w
        if UPPER:
            u = tl.minimum(u, tl.load(upper + at * upper_stride, mask=inside, other=0.0).to(tl.float64))
        r = _reduced_cost(index, cost, coefficient, lam, at, inside, COEFFICIENT, K)
        center = tl.full((WIDTH,), 0.0, tl.float64)
        if ANCHOR:
            center = tl.load(anchor + at, mask=inside, other=0.0).to(tl.float64)
        v = center - r / ridge
        theta = _cut_multiplier(v, u, w, cap, inside, EQUALITY, HALVINGS)
        x = tl.where(inside, tl.minimum(tl.maximum(v - theta * w, 0.0), u), 0.0)
        between = tl.sum(((x > 0.0) & (x < u * (1.0 - 1e-12))).to(tl.int32), axis=0)
        tight = tl.sum(w * x, axis=0) >= cap * (1.0 - 1e-12)
        fractional = ((between > 0) & ((between > 1) | (tight == 0))).to(tl.float64)
        least = _least_value(r, u, w, cap, inside, EQUALITY, HALVINGS)
        nonzero = tl.sum((x > 0.0).to(tl.int32), axis=0).to(tl.float64)
        if SHRINK:
            factor = tl.full((WIDTH,), 1.0, tl.float64)
            for e in tl.static_range(K):
                mine = tl.load(shrink + tl.load(index + at * K + e, mask=inside, other=0), mask=inside, other=1.0)
                if COEFFICIENT:
                    mine = tl.where(tl.load(coefficient + at * K + e, mask=inside, other=0.0) != 0.0, mine, 1.0)
                factor = tl.minimum(factor, mine)
            x = x * factor
        spent = tl.load(cost + at, mask=inside, other=0.0).to(tl.float64) * x
        used = inside & (x > 0.0)
        for e in tl.static_range(K):
            row = tl.load(index + at * K + e, mask=used, other=0)
            load = x
            if COEFFICIENT:
                load = x * tl.load(coefficient + at * K + e, mask=used, other=0.0).to(tl.float64)
            tl.atomic_add(sums + 2 * row, fixed_point(load, tl.load(scale + 2 * row, mask=used, other=0.0)), mask=used)
            if K == 1:
                factor = tl.load(scale + 2 * row + 1, mask=used, other=0.0)
                tl.atomic_add(sums + 2 * row + 1, fixed_point(spent, factor), mask=used)
        last = scale + 2 * rows
        tl.atomic_add(sums + 2 * rows, fixed_point(tl.sum(spent, axis=0), tl.load(last)))
        moved = tl.where(inside, (x - center) * (x - center), 0.0)
        tl.atomic_add(sums + 2 * rows + 1, fixed_point(tl.sum(moved, axis=0), tl.load(last + 1)))
        tl.atomic_add(sums + 2 * rows + 2, fixed_point(least, tl.load(last + 2)))
        tl.atomic_add(sums + 2 * rows + 3, fixed_point(fractional, tl.load(last + 3)))
        tl.atomic_add(sums + 2 * rows + 4, fixed_point(nonzero, tl.load(last + 4)))
        if PRIMAL:
            tl.store(out + at, x, mask=inside)


def dual_pass(
    offsets: Tensor,
    index: Tensor,
    cost: Tensor,
    coefficient: Tensor | None,
    lam: Tensor,
    gamma: float,
    cap: Tensor,
    upper: Tensor | None,
    weight: Tensor | None,
    equality: bool,
    anchor: Tensor | None,
    shrink: Tensor | None,
    scale: Tensor,
    bounds: Tensor,
    primal: bool,
) -> tuple[Tensor, Tensor]:
    """See `core_tensor.dual_pass`."""
    lengths = offsets[1:] - offsets[:-1]
    if lengths.numel() and int(lengths.max()) > WIDTHS[-1]:
        return reference.dual_pass(
            offsets, index, cost, coefficient, lam, gamma, cap, upper, weight, equality, anchor, shrink, scale, bounds,
            primal,
        )  # fmt: skip
    sums = torch.zeros(scale.shape[0], dtype=torch.int64, device=cost.device)
    x = torch.zeros(cost.shape[0] if primal else 0, dtype=torch.float64, device=cost.device)
    # As a tensor: Triton passes a Python float to a kernel in single precision.
    ridge = torch.full((1,), gamma, dtype=torch.float64, device=cost.device)
    given = [
        cost if t is None else t.contiguous() for t in (coefficient, lam, cap, upper, weight, anchor, shrink, scale)
    ]
    for low, width in zip((0, *WIDTHS[:-1]), WIDTHS, strict=True):
        chosen = torch.nonzero((lengths > low) & (lengths <= width)).ravel()
        count = chosen.shape[0]
        if count == 0:
            continue
        _pass_kernel[(-(-count // PER_PROGRAM),)](
            chosen, offsets.contiguous(), index.contiguous(), cost.contiguous(), *given, sums, x,
            ridge, int(offsets[0]), count, lam.shape[0], int(cap.shape[0] > 1),
            int(upper is not None and (upper.shape[0] > 1 or cost.shape[0] == 1)), PER_PROGRAM,
            equality, coefficient is not None, upper is not None, weight is not None, anchor is not None,
            shrink is not None, primal, index.shape[1] if index.ndim == 2 else 1, width, HALVINGS,
            num_warps=max(1, width // 128),
        )  # fmt: skip
    return sums, x


_POINTERS = {
    **dict.fromkeys(("chosen", "offsets"), "*i64"),
    "index": "*i32",
    **dict.fromkeys(("cost", "coefficient", "upper", "weight", "anchor"), "*fp32"),
    **dict.fromkeys(("gamma", "lam", "caps", "shrink", "scale", "out"), "*fp64"),
    "sums": "*i64",
    "base": "i64",
    **dict.fromkeys(("count", "rows", "cap_stride", "upper_stride", "per_program"), "i32"),
}
COMPILE = [
    CompileRow(
        _pass_kernel,
        _POINTERS,
        {
            "EQUALITY": equality, "COEFFICIENT": True, "UPPER": bounded, "WEIGHT": bounded, "ANCHOR": anchored,
            "SHRINK": rows > 1, "PRIMAL": anchored, "K": rows, "WIDTH": width, "HALVINGS": HALVINGS,
        },
        num_warps=max(1, width // 128),
    )
    for width in WIDTHS
    for equality, bounded, anchored, rows in ((False, False, False, 1), (True, False, True, 1), (False, True, True, 2))
]  # fmt: skip
