r"""Outlier-aware quantization: a sparse matrix H of full-precision weights beside the codes.

$$ \min_{\hat W, H} \operatorname{tr}\,(W - \hat W - H)\,\Sigma\,(W - \hat W - H)^\top \quad\text{with } \hat W
\text{ on the grid and at most } s \text{ non-zeros (or columns) in } H. $$
"""

import torch
from torch import Tensor

from quantease.algorithms.descent import certify, descend
from quantease.algorithms.gptq import gptq
from quantease.algorithms.heldout import make_grid
from quantease.algorithms.refit import refit_scales
from quantease.algorithms.sweep import Sweeper, schedule
from quantease.problem.config import LayerConfig
from quantease.problem.grid import Grid
from quantease.problem.problem import Candidate, Problem, Solution


def outlier_iht(problem: Problem, config: LayerConfig) -> Solution:
    r"""The paper's method: sweeps on the target $W - H$ in turn with iterative hard thresholding of H.

    $$ H \leftarrow T_s\bigl(H - (\hat W + H - W)\,\Sigma / \lambda\bigr), \qquad \lambda \ge \lambda_{\max}(\Sigma). $$

    Departure: the grid is made once, from the first support, instead of anew in every sweep; with a grid that moves
    the objective need not fall. $\lambda$ is 1.05 times the result of a power iteration, which is a lower bound.

    Args:
        problem: Weights and Gram matrix.
        config: Grid, sweeps, fraction and structure of the outliers.

    Returns:
        Codes and H; trace by sweep.

    Source: arXiv 2309.01885, Alg. 3 and section 4.
    """
    W = problem.weight
    score = W.abs() if config.structure == "unstructured" else W.double().square()
    H = W * top_mask(score, config)
    grid = make_grid(W, problem.energy, config, clip=config.clips, mask=_outside(W, config))
    sweeper = Sweeper(problem, grid, block=config.block)
    D, step = sweeper.residual(W), 1 / (1.05 * largest_eigenvalue(problem.sigma))  # D = (W - H - W_hat)'; starts at 0
    trace = []
    for t, quantize in enumerate(schedule(30 if config.sweeps is None else config.sweeps, config.relax)):
        sweeper.weight = (W - H).T.contiguous() * sweeper.unit
        sweeper.sweep(D, quantize=quantize)
        moved = H + (problem.sigma @ D).T * (step / sweeper.unit)
        new = moved * top_mask(moved.abs() if config.structure == "unstructured" else moved.double().square(), config)
        D -= (new - H).T * sweeper.unit
        H = new
        objective = float(((problem.sigma @ D).double() * D).sum())
        trace.append((f"sweep {t}{'' if quantize else ' relaxed'}", objective / sweeper.unit**2 / problem.scale))
    codes = grid.quantize(W - H - D.T / sweeper.unit)
    H = H.to(config.storage).to(W.dtype)
    return Solution(problem.candidate(codes, grid, H), trace=tuple(trace), mask=H != 0)


def outlier_descent(problem: Problem, config: LayerConfig) -> Solution:
    r"""Mixed descent: for a fixed support, the same sweeps with the outliers' coordinates left continuous.

    The support holds the weights that the clip grid serves worst, by $|w - q(w)| \sqrt{\Sigma_{jj}}$ (or the columns
    with the largest $\|W_j\|^2 \Sigma_{jj}$); the grid is then made for the others. GPTQ of what the outliers leave is
    the start. A quantised sweep minimises exactly in every coordinate, continuous or not: no step size, no largest
    eigenvalue, and the objective never rises.

    Departure: the paper moves the support by hard thresholding; `outlier_iht` is its method.

    Args:
        problem: Weights and Gram matrix.
        config: Grid, sweeps, fraction and structure of the outliers.

    Returns:
        Codes (the zero point under an outlier) and H, with the certificate of a coordinate-wise minimum in the codes.
    """
    W = problem.weight
    mask, grid = _support(problem, config)
    start = torch.where(mask, W, 0.0)
    codes = gptq(Problem(W - start, problem.sigma), grid, damping=config.damping, act_order=config.act_order)
    start = start + grid.dequantize(codes, W.dtype)
    sweeps = 15 if config.sweeps is None else config.sweeps
    best = _mixed(problem, grid, mask, start, schedule(sweeps, config.relax), config)
    trace = [("mixed descent", best.total / problem.scale)]
    for round_ in range(config.refits):
        refitted = refit_scales(problem, best, storage=config.storage)
        values = best.grid.dequantize(best.codes, W.dtype) + (0.0 if best.sparse is None else best.sparse)
        best = best.best_rows(_mixed(problem, refitted, mask, values, schedule(3, 0), config))
        trace.append((f"refit {round_}", best.total / problem.scale))
    best = descend(problem, best, frozen=mask)
    trace.append(("descent", best.total / problem.scale))
    return Solution(best, certify(problem, best, frozen=mask), trace=tuple(trace), mask=mask)


def _support(problem: Problem, config: LayerConfig) -> tuple[Tensor, Grid]:
    W, energy = problem.weight, problem.energy
    mask = torch.zeros_like(W, dtype=torch.bool)
    grid = make_grid(W, energy, config, clip=config.clips)
    if config.structure == "structured":
        mask = top_mask(W.double().square() * energy, config)
        return mask, make_grid(W, energy, config, clip=config.clips, mask=mask)
    for _ in range(3):  # grid and support each for the other
        error = W - grid.dequantize(grid.quantize(W), W.dtype)
        mask = top_mask(error.double().square() * energy, config)
        grid = make_grid(W, energy, config, clip=config.clips, mask=mask)
    return mask, grid


def _mixed(
    problem: Problem, grid: Grid, mask: Tensor, start: Tensor, plan: list[bool], config: LayerConfig
) -> Candidate:
    sweeper = Sweeper(problem, grid, mask=mask, block=config.block)
    D = sweeper.residual(start)
    for quantize in plan:
        sweeper.sweep(D, quantize=quantize)
    values = sweeper.values(D)
    H = torch.where(mask, values, 0.0).to(config.storage).to(values.dtype)
    return problem.candidate(grid.quantize(torch.where(mask, 0.0, values)), grid, H)


def _outside(W: Tensor, config: LayerConfig) -> Tensor:
    # Positions that the paper's grid ignores: per row the extremes (unstructured), or the first outlier columns.
    if config.structure == "structured":
        return top_mask(W.double().square(), config)
    count = round(W.shape[1] * config.outliers / 2)
    rank = W.argsort(1).argsort(1)
    return (rank < count) | (rank >= W.shape[1] - count)


def top_mask(score: Tensor, config: LayerConfig) -> Tensor:
    """The support of the outliers: the largest scores of the whole matrix, or the columns with the largest sums.

    Args:
        score: Non-negative, shape (q, p).
        config: Fraction and structure.

    Returns:
        Exactly `round(fraction * q * p)` entries (or `round(fraction * p)` columns) set, shape (q, p), bool.
    """
    if config.structure == "structured":
        columns = torch.zeros(score.shape[1], dtype=torch.bool, device=score.device)
        columns[score.sum(0).topk(round(config.outliers * score.shape[1])).indices] = True
        return columns.expand_as(score).clone()
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask.view(-1)[score.flatten().topk(round(config.outliers * score.numel())).indices] = True
    return mask


def largest_eigenvalue(sigma: Tensor, iterations: int = 60) -> float:
    r"""$\lambda_{\max}$ of a Gram matrix by power iteration, from below.

    Args:
        sigma: Shape (p, p).
        iterations: Products with the matrix.

    Returns:
        Rayleigh quotient of the last vector; 1 for a zero matrix.
    """
    v = sigma.diagonal().sqrt() + 1e-3
    for _ in range(iterations):
        v = sigma @ (v / v.norm().clamp_min(1e-30))
    v = v / v.norm().clamp_min(1e-30)
    return float(v @ (sigma @ v)) or 1.0
