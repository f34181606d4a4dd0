"""QuantEase as in the paper: dense sweeps, some of which leave the grid."""

import torch
from torch import Tensor

from quantease.algorithms.sweep import Sweeper, schedule
from quantease.problem.grid import Grid
from quantease.problem.problem import Problem


def relaxed_descent(
    problem: Problem,
    grid: Grid,
    start: Tensor,
    *,
    sweeps: int = 30,
    relax: int = 3,
    keep_best: bool = False,
    block: int = 512,
) -> tuple[Tensor, tuple[tuple[str, float], ...]]:
    r"""Sweep over all features by a schedule of quantised and relaxed sweeps.

    Quantised sweeps from a point on the grid never raise the objective; a relaxed one lowers it off the grid and lets
    the next one land elsewhere, better or worse.

    Args:
        problem: Weights and Gram matrix.
        grid: Scales and zero points, fixed.
        start: $\hat W$ to start from, W itself in the paper, shape (q, p).
        sweeps: Number of sweeps.
        relax: Period of the relaxed sweeps; 0 has none.
        keep_best: Return for every row the best quantised iterate instead of the last.
        block: Features per block.

    Returns:
        Codes, shape (q, p), uint8, and the relative objective after each sweep.

    Source: arXiv 2309.01885, Alg. 2 and section 3 (relaxation); `keep_best` is ours.
    """
    sweeper = Sweeper(problem, grid, block=block)
    residual = sweeper.residual(start)
    objective = ((problem.sigma @ residual) * residual).sum(0)  # (q,)
    best = torch.full_like(objective, torch.inf)
    codes = torch.empty(problem.weight.shape, dtype=torch.uint8, device=residual.device)
    trace = []
    plan = schedule(sweeps, relax)
    for t, quantize in enumerate(plan):
        sweeper.sweep(residual, quantize=quantize, objective=objective)
        trace.append(
            (f"sweep {t}{'' if quantize else ' relaxed'}", float(objective.sum()) / sweeper.unit**2 / problem.scale)
        )
        if quantize and (keep_best or t == sweeps - 1):
            better = objective < best if keep_best else torch.ones_like(best, dtype=torch.bool)
            codes[better] = sweeper.codes(residual)[better]
            best = torch.minimum(best, objective)
    return codes, tuple(trace)
