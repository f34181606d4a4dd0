"""Plain torch, float64: bisection on the multiplier of every block at once, then the exact root of the last piece."""

import torch
from torch import Tensor

from core_tensor.checks import check_offsets


def block_of(offsets: Tensor) -> Tensor:
    """The block of every variable, shape (variables,)."""
    blocks = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(blocks, offsets[1:] - offsets[:-1])


def sums(values: Tensor, block: Tensor, blocks: int) -> Tensor:
    """Sum of every block, shape (blocks,)."""
    return values.new_zeros(blocks).index_add(0, block, values)


def bounds(
    variables: int, offsets: Tensor, cap: Tensor, upper: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Block of every variable, its weight, and its own bound min(u, d / w)."""
    block = block_of(offsets)
    w = cap.new_ones(variables) if weight is None else weight.double()
    limit = (cap if cap.shape[0] == 1 else cap[block]) / w
    return block, w, limit if upper is None else torch.minimum(upper.double().expand(variables), limit)


def reach(variables: int, offsets: Tensor, cap: Tensor, upper: Tensor | None, weight: Tensor | None) -> Tensor:
    """Greatest value of w'x over the box of every block, shape (blocks,)."""
    block, w, u = bounds(variables, offsets, cap, upper, weight)
    return sums(w * u, block, offsets.shape[0] - 1)


def project_blocks(
    values: Tensor, offsets: Tensor, cap: Tensor, upper: Tensor | None, weight: Tensor | None, equality: bool
) -> Tensor:
    """See `core_tensor.project_blocks`."""
    check_offsets("offsets", offsets, values.shape[0])
    blocks = offsets.shape[0] - 1
    block, w, u = bounds(values.shape[0], offsets, cap, upper, weight)
    d = cap.expand(blocks)
    if values.numel() == 0:
        return values.clone()

    def at(theta: Tensor) -> Tensor:
        return torch.minimum((values - theta[block] * w).clamp_min(0), u)

    low = values.new_full((blocks,), torch.inf).scatter_reduce(0, block, (values - u) / w, "amin")
    high = values.new_full((blocks,), -torch.inf).scatter_reduce(0, block, values / w, "amax")
    if not equality:
        low = low.clamp_min(0)
    zero = torch.zeros_like(low)
    cut = torch.ones_like(low, dtype=torch.bool) if equality else sums(w * at(zero), block, blocks) > d
    cut &= torch.isfinite(low) & torch.isfinite(high)
    low, high = torch.where(cut, low, zero), torch.where(cut, high, zero)
    for _ in range(120):
        middle = (low + high) / 2
        over = sums(w * at(middle), block, blocks) > d
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    theta = (low + high) / 2
    x = values - theta[block] * w
    free = (x > 0) & (x < u)
    rest = (
        d
        - sums(torch.where(x >= u, w * u, 0.0), block, blocks)
        - sums(torch.where(free, w * values, 0.0), block, blocks)
    )
    square = sums(torch.where(free, w * w, 0.0), block, blocks)
    return at(torch.where(cut & (square > 0), -rest / square.clamp_min(1e-300), theta))


def minimiser(
    r: Tensor, offsets: Tensor, cap: Tensor, upper: Tensor | None, weight: Tensor | None, equality: bool
) -> Tensor:
    """A point of least r'v in every block: the fractional knapsack, filled in the order of r / w."""
    block, w, u = bounds(r.shape[0], offsets, cap, upper, weight)
    size = torch.where((r < 0) | equality, w * u, 0.0)
    order = torch.argsort(r / w, stable=True)
    order = order[torch.argsort(block[order], stable=True)]
    full, block = size[order], block[order]
    before = torch.cumsum(full, 0) - full
    start = torch.cat([before, before.new_zeros(1)])[offsets[:-1].clamp_max(r.shape[0])]
    left = (cap if cap.shape[0] == 1 else cap[block]) - (before - start[block])
    taken = torch.minimum(full, left.clamp_min(0)) / w[order]
    return torch.empty_like(r).index_copy(0, order, taken)


def least_value(
    r: Tensor, offsets: Tensor, cap: Tensor, upper: Tensor | None, weight: Tensor | None, equality: bool
) -> Tensor:
    """Least r'v over every block, shape (blocks,)."""
    v = minimiser(r, offsets, cap, upper, weight, equality)
    return sums(r * v, block_of(offsets), offsets.shape[0] - 1)


def tangent(
    direction: Tensor,
    x: Tensor,
    offsets: Tensor,
    cap: Tensor,
    upper: Tensor | None,
    weight: Tensor | None,
    equality: bool,
) -> Tensor:
    """The derivative of the projection at its value x, applied to a direction; symmetric, so also its transpose."""
    blocks = offsets.shape[0] - 1
    block, w, u = bounds(x.shape[0], offsets, cap, upper, weight)
    free = (x > 0) & (x < u)
    if cap.shape[0] != 1 or bool(torch.isfinite(cap).all()) or equality:  # u = min(u, d / w) binds through the cut
        own = torch.full_like(x, torch.inf) if upper is None else upper.to(x.dtype).expand_as(x)
        free = (x > 0) & (x < own)
    tight = (sums(w * x, block, blocks) >= cap.expand(blocks) * (1 - 1e-12)) | equality
    w = torch.where(free, w, 0.0)
    mean = sums(w * direction, block, blocks) / sums(w * w, block, blocks).clamp_min(1e-300)
    return torch.where(free, direction, 0.0) - torch.where(tight, mean, 0.0)[block] * w
