"""Plain torch: Wolfe's method on dense vertices, with `assignment`'s reference as its oracle."""

from itertools import pairwise

import torch
from torch import Tensor

from core_tensor.checks import check_tensor
from core_tensor.ops.assignment import reference

LARGEST = 1e150
"""Inner products of larger values overflow."""


def check(values: Tensor, offsets: Tensor, slots: int, filled: bool) -> None:
    """Refuse values and blocks that cannot be projected; see `core_tensor.project_assignment` for the arguments.

    Args:
        values: Points y.
        offsets: Bounds of the blocks.
        slots: Slots per block.
        filled: Whether every slot must be filled.

    Raises:
        ValueError: If a value is too large or no number, or a block is not of items by slots.
    """
    size = float(values.abs().max()) if len(values) else 0.0
    if not size <= LARGEST:
        check_tensor("values", values, finite=True)
        raise ValueError(f"values: expected magnitudes up to {LARGEST:g}, got {size:.3g}")
    bounds = offsets.tolist()
    lengths = {high - low for low, high in pairwise(bounds)}
    if min(lengths, default=0) < 0 or bounds[-1] - bounds[0] != len(values):
        raise ValueError(f"offsets: expected rising bounds of {len(values)} variables")
    if any(n % slots or (filled and 0 < n < slots**2) for n in lengths):
        least = f"at least {slots} items" if filled else "whole items"
        raise ValueError(f"offsets: expected blocks of {least} by {slots} slots")


def project_assignment(
    values: Tensor, offsets: Tensor, slots: int, filled: bool, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `core_tensor.project_assignment`."""
    check(values, offsets, slots, filled)
    blocks = offsets.shape[0] - 1
    x = torch.zeros_like(values)
    weights = values.new_zeros(blocks, limit)
    items = torch.full((blocks, limit, slots), -1, dtype=torch.int32, device=values.device)
    bounds = (offsets - offsets[0]).tolist()
    for b in range(blocks):
        y = values[bounds[b] : bounds[b + 1]]
        found = _project(y, slots, filled, limit) if len(y) else None
        if found is not None:
            vertices, w = found
            x[bounds[b] : bounds[b + 1]] = w @ vertices
            weights[b, : len(w)] = w
            grid = vertices.view(len(w), -1, slots)
            items[b, : len(w)] = torch.where(grid.any(1), grid.argmax(1), -1).int()
    return x, weights, items


def _best(direction: Tensor, slots: int, filled: bool) -> Tensor:
    gain = direction.view(-1, slots).T  # (slots, items)
    if not filled:  # one column per slot means leaving it empty
        gain = torch.cat([gain, gain.new_zeros(slots, slots)], 1)
    rows, columns = gain.shape
    cost = torch.cat([-gain, gain.new_zeros(columns - rows, columns)])
    item = reference.assignment(cost[None])[0, :slots]
    vertex = torch.zeros_like(direction).view(-1, slots)
    slot = torch.arange(slots, device=direction.device)
    real = item < len(vertex)
    if not filled:
        real &= gain[slot, item] > 0
    vertex[item[real], slot[real]] = 1.0
    return vertex.view(-1)


def _project(y: Tensor, slots: int, filled: bool, limit: int) -> tuple[Tensor, Tensor] | None:
    S, w = _best(y, slots, filled)[None], y.new_ones(1)
    for _ in range(1000 + 10 * len(y)):
        x = w @ S
        step = y - x
        q = _best(step, slots, filled)
        gain = step @ (q - x)
        if bool(gain <= 1e-15 * (1.0 + (step @ x).abs() + (step @ q).abs())) or bool((q == S).all(1).any()):
            return S, w
        if len(w) >= limit:
            return None
        T, v = _minor(torch.cat([S, q[None]]), torch.cat([w, w.new_zeros(1)]), y)
        moved = v @ T - x
        if bool(step @ moved <= 0.5 * moved @ moved):
            return S, w
        S, w = T, v
    return None


def _minor(S: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    while len(w) > 1:
        D = S[1:] - S[0]
        a = torch.linalg.solve(D @ D.T, D @ (y - S[0]))
        alpha = torch.cat([1.0 - a.sum(0, keepdim=True), a])
        if bool((alpha > -1e-14).all()):
            w = alpha
        else:
            negative = alpha < 0
            reach = torch.where(negative, w / (w - alpha), torch.inf)
            w = w + reach.min() * (alpha - w)
            w[reach.argmin()] = 0.0
        keep, inside = w > 1e-14, bool((alpha > -1e-14).all())
        S, w = S[keep], w[keep] / w[keep].sum()
        if inside:
            return S, w
    return S, torch.ones_like(w)
