"""The clip grid: ends of every row's grid pulled in until the weighted rounding error is least."""

from collections.abc import Callable

import torch
from torch import Tensor

from quantease.problem.grid import Grid, extremes, grid_between

_COARSE = 0.9 ** torch.arange(25)  # shrink factors 1 to 0.08
_FINE = torch.tensor([0.94, 0.97, 1.03, 1.06])  # around the best so far, whose error is known


def clip_grid(
    weight: Tensor,
    energy: Tensor,
    *,
    bits: int,
    group: Tensor,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    mask: Tensor | None = None,
) -> Grid:
    r"""Shrink the ends of the min/max grid, per row and group, to.

    $$ \min_{lo, hi} \sum_j \Sigma_{jj} \bigl(W_{ij} - q_{lo, hi}(W_{ij})\bigr)^2, $$

    first both ends by one factor, then (asymmetric grids) each end on its own around the best.

    Args:
        weight: W, shape (q, p).
        energy: Diagonal of $\Sigma$, shape (p,).
        bits: b.
        group: Group of every feature, shape (p,), int64.
        symmetric: Zero point fixed in the middle.
        scale_dtype: Precision in which scales are stored.
        mask: Positions left out (outliers), shape (q, p), bool.

    Returns:
        The grid; in no row and group is its error above that of the min/max grid.
    """
    parts = []
    energy = energy.float()
    rows = max(1, (1 << 16) // weight.shape[1])  # a chunk that stays in the cache while all factors are tried
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        W, M = weight[part].float(), None if mask is None else mask[part]

        def make(lo: Tensor, hi: Tensor) -> Grid:
            return grid_between(lo, hi, bits=bits, group=group, symmetric=symmetric, scale_dtype=scale_dtype)

        parts.append(_search(W, energy if M is None else energy * ~M, *extremes(W, group, M), make, symmetric))
    return Grid(torch.cat([grid.scale for grid in parts]), torch.cat([grid.zero for grid in parts]), group, 2**bits - 1)


def _search(
    W: Tensor, energy: Tensor, lo: Tensor, hi: Tensor, make: Callable[[Tensor, Tensor], Grid], symmetric: bool
) -> Grid:
    if symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    empty = hi - lo <= 0
    lo, hi = lo.masked_fill(empty, -1.0), hi.masked_fill(empty, 1.0)
    best = torch.full_like(lo, torch.inf)
    unit = 1 / max(float(hi.max() - lo.min()), 1e-38)  # squares of very large and very small weights stay in range
    ends = (lo, hi)

    def attempt(low: Tensor, high: Tensor) -> None:
        nonlocal best, ends
        error = _weighted_error(W, energy, make(low, high), unit)
        better = error < best
        best = torch.where(better, error, best)
        ends = (torch.where(better, low, ends[0]), torch.where(better, high, ends[1]))

    for factor in _COARSE.tolist():
        attempt(lo * factor, hi * factor)
    if symmetric:
        low, high = ends
        for factor in _FINE.tolist():
            attempt(low * factor, high * factor)
    else:
        for _ in range(2):
            low, high = ends
            for factor in _FINE.tolist():
                attempt(low * factor, high)
            low, high = ends
            for factor in _FINE.tolist():
                attempt(low, high * factor)
    return make(*ends)


def _weighted_error(W: Tensor, energy: Tensor, grid: Grid, unit: float) -> Tensor:
    scale, zero = grid.spread(grid.scale), grid.spread(grid.zero)
    nearest = (W / scale).round_().add_(zero).clamp_(0, grid.max_code).sub_(zero)
    error = nearest.mul_(scale).sub_(W).mul_(unit).square_()
    if energy.ndim == 1 and grid.scale.shape[1] == 1:
        return (error @ energy)[:, None]  # (rows, 1)
    return torch.zeros_like(grid.scale).index_add_(1, grid.group, error.mul_(energy))  # (rows, G)
