"""Sparse coordinate descent on the codes, to a coordinate-wise minimum that is certified in float64."""

from dataclasses import replace

import core_tensor
import torch
from torch import Tensor

from quantease.problem.problem import Candidate, Certificate, Problem


def descend(
    problem: Problem,
    candidate: Candidate,
    *,
    frozen: Tensor | None = None,
    exact: bool = True,
    max_sweeps: int = 100,
) -> Candidate:
    r"""Change one code at a time, feature by feature, until no change lowers the objective.

    With the gradient $g = \Sigma (w - \hat w)$ of a row, feature j's best code is
    $c_j = \operatorname{clamp}(\operatorname{round}((\hat w_j + g_j / \Sigma_{jj}) / s) + z)$. Few codes move, so a
    sweep costs a scan and one row of $\Sigma$ per move. The work is done in float32; then the gradient is formed anew
    in float64 and the sweeps continue in float64, where almost nothing is left to move.

    Args:
        problem: Weights and Gram matrix.
        candidate: Where to start.
        frozen: Codes that stay as they are, shape (q, p), bool.
        exact: False stops after float32.
        max_sweeps: Most sweeps in each precision.

    Returns:
        A candidate that is in no row worse than the start; with its gradient, if `exact`.
    """
    single = sparse_sweeps(problem.weight, problem.sigma, candidate, frozen, max_sweeps)
    if not exact:
        return candidate.best_rows(problem.candidate(single, candidate.grid, candidate.sparse))
    return _descend_exactly(problem, candidate, single, frozen, max_sweeps)


def _descend_exactly(
    problem: Problem, before: Candidate, codes: Tensor, frozen: Tensor | None, max_sweeps: int
) -> Candidate:
    # One float64 product gives the objective of what float32 found, the gradient to continue from and, updated by the
    # sweeps, the objective at their end.
    W, grid, sparse = problem.weight.double(), before.grid, before.sparse

    def residual(codes: Tensor) -> Tensor:
        D = W - grid.dequantize(codes, torch.float64)
        return D if sparse is None else D - sparse

    D = residual(codes)
    gradient = D @ problem.sigma64
    single = Candidate(codes, grid, torch.linalg.vecdot(D, gradient).clamp_min_(0.0), sparse)
    start = before.best_rows(single)
    back = (~(single.objective < before.objective)).nonzero()[:, 0]  # rows that float32 did not improve
    gradient[back] = residual(start.codes)[back] @ problem.sigma64
    start = replace(start, gradient=gradient)
    moved, gradient, changes, _ = core_tensor.cd_sparse(
        start.codes, gradient, problem.sigma64, grid.scale.double(), grid.group, frozen, grid.max_code, max_sweeps
    )
    D, touched = residual(moved), changes.nonzero()[:, 0]
    gradient[touched] = D[touched] @ problem.sigma64  # few; free of what the updates have rounded
    objective = torch.linalg.vecdot(D, gradient).clamp_min_(0.0)
    return start.best_rows(Candidate(moved, grid, objective, sparse, gradient))


def _gradient(W: Tensor, sigma: Tensor, candidate: Candidate) -> Tensor:
    residual = W - candidate.grid.dequantize(candidate.codes, W.dtype)
    if candidate.sparse is not None:
        residual -= candidate.sparse
    return residual @ sigma  # (q, p)


def sparse_sweeps(
    W: Tensor,
    sigma: Tensor,
    candidate: Candidate,
    frozen: Tensor | None,
    max_sweeps: int,
    gradient: Tensor | None = None,
) -> Tensor:
    """Sweeps of `core_tensor.cd_sparse` in the precision of the arguments.

    Args:
        W: Weights, shape (q, p).
        sigma: Gram matrix, shape (p, p), of the same dtype.
        candidate: Where to start.
        frozen: Codes that stay as they are, shape (q, p), bool; None for none.
        max_sweeps: Most sweeps per row.
        gradient: The start's, shape (q, p); None forms it.

    Returns:
        Codes, shape (q, p), uint8.
    """
    grid = candidate.grid
    if gradient is None:
        gradient = _gradient(W, sigma, candidate)
    scale = grid.scale.to(W.dtype)
    codes, _, _, _ = core_tensor.cd_sparse(
        candidate.codes, gradient, sigma, scale, grid.group, frozen, grid.max_code, max_sweeps
    )
    return codes


def certify(problem: Problem, candidate: Candidate, *, frozen: Tensor | None = None) -> Certificate:
    r"""Look, in float64, for the best change of one code in every row.

    Moving feature j from $\hat w_j$ to $v$ changes the objective by
    $\Sigma_{jj} (v - \beta_j)^2 - \Sigma_{jj} (\hat w_j - \beta_j)^2$ with $\beta_j = \hat w_j + g_j / \Sigma_{jj}$, so
    the best code is the one nearest to $\beta_j$.

    Args:
        problem: Weights and Gram matrix.
        candidate: The solution to judge.
        frozen: Codes that may not change, shape (q, p), bool.

    Returns:
        The certificate.
    """
    grid = candidate.grid
    values = grid.dequantize(candidate.codes, torch.float64)
    gradient = candidate.gradient
    if gradient is None:
        gradient = _gradient(problem.weight.double(), problem.sigma64, candidate)
    energy = problem.sigma64.diagonal()
    live = energy > 0
    beta = values + torch.where(live, gradient / energy.clamp_min(torch.finfo(energy.dtype).tiny), 0.0)
    scale, zero = grid.scale[:, grid.group].double(), grid.zero[:, grid.group].double()
    nearest = scale * (((beta / scale).round() + zero).clamp_(0, grid.max_code) - zero)
    gain = energy * ((values - beta).square() - (nearest - beta).square())
    gain = torch.where(live if frozen is None else live & ~frozen, gain, 0.0)
    step = (energy * scale.square()).amax(1)
    size = torch.where(candidate.objective > 0, candidate.objective, step.clamp_min(torch.finfo(step.dtype).tiny))
    return Certificate(gain.amax(1).clamp_min_(0.0) / size)
