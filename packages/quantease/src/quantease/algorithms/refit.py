"""Closed-form refit of the scales for given codes."""

from dataclasses import replace

import torch

from quantease.problem.grid import Grid, store_scale
from quantease.problem.problem import Candidate, Problem


def refit_scales(problem: Problem, candidate: Candidate, *, storage: torch.dtype) -> Grid:
    r"""Coordinate descent on the scales: with $v_g$ the centred codes $c - z$ of group g and all else fixed,.

    $$ s_g \leftarrow s_g + \frac{v_g^\top (\Sigma d)_g}{v_g^\top \Sigma_{gg} v_g}, \qquad d = w - \hat w . $$

    With one group per row this is the least-squares scale. Where the result is not positive the scale stays.

    Args:
        problem: Weights and Gram matrix.
        candidate: Codes and their grid.
        storage: Dtype in which scales are stored; the result is rounded to it.

    Returns:
        A grid with new scales; after rounding it need not be better in every row.
    """
    grid = candidate.grid
    scale = grid.scale.clone()
    centred = candidate.codes.to(problem.weight.dtype) - grid.zero[:, grid.group]  # (q, p)
    residual = problem.weight - centred * grid.scale[:, grid.group]
    if candidate.sparse is not None:
        residual -= candidate.sparse
    for g in range(scale.shape[1]):
        members = (grid.group == g).nonzero()[:, 0]
        columns = slice(int(members[0]), int(members[-1]) + 1)  # groups are consecutive
        v = centred[:, columns]
        known = candidate.gradient if scale.shape[1] == 1 else None  # with several groups it moves with their scales
        pull = residual @ problem.sigma[:, columns] if known is None else known.to(v.dtype)
        slope = torch.einsum("ij,ij->i", pull, v)
        curvature = torch.einsum("ij,ij->i", v @ problem.sigma[columns, columns], v)
        new = scale[:, g] + torch.where(curvature > 0, slope / curvature.clamp_min(1e-30), 0.0)
        new = torch.where(new > 0, new, scale[:, g])
        residual[:, columns] -= v * (new - scale[:, g])[:, None]
        scale[:, g] = new
    return replace(grid, scale=store_scale(scale.float().clamp_max(torch.finfo(storage).max), storage))
