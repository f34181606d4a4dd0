"""GPTQ, then sparse descent to a certified coordinate-wise minimum: the cheapest route to one."""

import core_tensor
import torch
from torch import Tensor

from quantease.algorithms.descent import certify
from quantease.algorithms.gptq import gptq_with_gradient
from quantease.problem.grid import Grid
from quantease.problem.problem import Certificate, Problem

PROBES = 8
"""Random directions in which the error of the gradient is measured."""

_SAFETY = 4.0
_CHUNK = 256  # suspects at a time


def gptq_descent(
    problem: Problem,
    grid: Grid,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    max_sweeps: int = 100,
    seed: int = 0,
) -> tuple[Tensor, Certificate]:
    r"""Minimise in every single code from GPTQ's solution on, and prove that nothing is left to gain.

    1. GPTQ, whose factor and errors give the gradient $g = D\Sigma$ for a triangular product.
    2. Sparse sweeps in float32, which keep g up to date.
    3. Certificate: a code is at its best if its move $|g_j| / (\Sigma_{jj} s)$ is at most half a step. The error
       $\varepsilon_i$ of row i of g, of whatever origin, is measured against float64 in a few random directions z,
       $(g - D\Sigma) z$ (Freivalds' check: two products with few columns). Codes whose move is nearer to half a step
       than $4 \lVert\varepsilon_i\rVert_2$ allows for are looked at one by one in float64; rows with a code that
       does gain are finished in float64. (`descent.certify` proves the same with a whole float64 product.)

    Args:
        problem: Weights and Gram matrix.
        grid: Scales and zero points.
        damping: As in `gptq`.
        act_order: As in `gptq`.
        max_sweeps: Most sweeps in each precision.
        seed: Of the random directions.

    Returns:
        Codes, shape (q, p), uint8, and the certificate.
    """
    codes, gradient = gptq_with_gradient(problem, grid, damping=damping, act_order=act_order)
    scale = grid.scale.to(gradient.dtype)
    codes, gradient, _, _ = core_tensor.cd_sparse(
        codes, gradient, problem.sigma, scale, grid.group, None, grid.max_code, max_sweeps
    )
    rows, columns = _suspects(problem, grid, codes, gradient, seed)
    gains = _gains(problem, grid, codes, rows, columns)
    open_rows = rows[gains > 0].unique()
    if len(open_rows):
        codes[open_rows] = _finish(problem, grid, codes, open_rows, max_sweeps)
    gaps = torch.zeros(len(codes), dtype=torch.float64, device=codes.device)
    return codes, Certificate(gaps.index_copy_(0, open_rows, _left(problem, grid, codes, open_rows)))


def _residual(problem: Problem, grid: Grid, codes: Tensor, rows: Tensor) -> Tensor:
    return problem.weight[rows].double() - grid.rows(rows).dequantize(codes[rows], torch.float64)


def _suspects(problem: Problem, grid: Grid, codes: Tensor, gradient: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    # Rows and columns of the codes of which float32 cannot tell that they are at their best.
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randint(0, 2, (len(problem.sigma), PROBES), generator=generator).mul_(2).sub_(1)
    Z = Z.to(problem.weight.device, torch.float64)
    pull, live = problem.sigma64 @ Z, problem.energy > 0
    found: list[Tensor] = []
    chunk = max(16, (1 << 16) // len(Z))  # rows whose float64 copies stay in the cache
    for start in range(0, len(codes), chunk):
        part = torch.arange(start, min(start + chunk, len(codes)), device=codes.device)
        g, c = gradient[start : start + chunk], codes[start : start + chunk]
        off = g.double() @ Z - _residual(problem, grid, codes, part) @ pull  # (chunk, PROBES)
        error = off.square().mean(1).sqrt_().mul_(_SAFETY).to(g.dtype)[:, None]
        half = 0.5 * problem.energy * grid.rows(part).spread(grid.scale[part])  # moves a code by half a step
        wants = ((g + error >= half) & (c < grid.max_code)) | ((g - error <= -half) & (c > 0))
        found.append((wants & live).nonzero() + torch.tensor([start, 0], device=codes.device))
    rows, columns = torch.cat(found).T
    return rows, columns


def _gains(problem: Problem, grid: Grid, codes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    # By how much the best move of each of these codes lowers its row's objective, relative to one step's worth.
    gains = torch.empty(len(rows), dtype=torch.float64, device=codes.device)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        i, j = rows[part], columns[part]
        g = torch.linalg.vecdot(_residual(problem, grid, codes, i), problem.sigma64[j])
        scale, energy = grid.scale[i, grid.group[j]].double(), problem.energy[j].double()
        move = g / (energy * scale)  # in steps, to the minimum of the parabola
        code = codes[i, j].double()
        best = (code + move.round()).clamp_(0, grid.max_code) - code
        gains[part] = move.square() - (move - best).square()
    return torch.where(gains > 1e-12, gains, 0.0)


def _finish(problem: Problem, grid: Grid, codes: Tensor, rows: Tensor, max_sweeps: int) -> Tensor:
    scale = grid.scale[rows].double()
    gradient = _residual(problem, grid, codes, rows) @ problem.sigma64
    return core_tensor.cd_sparse(
        codes[rows], gradient, problem.sigma64, scale, grid.group, None, grid.max_code, max_sweeps
    )[0]


def _left(problem: Problem, grid: Grid, codes: Tensor, rows: Tensor) -> Tensor:
    # The certificate of the rows that float64 finished, by the definition.
    part = Problem(problem.weight[rows], problem.sigma)
    return certify(part, part.candidate(codes[rows], grid.rows(rows))).gaps
