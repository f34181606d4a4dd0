"""GPTQ with act-order and static groups: error feedback along a Cholesky factor."""

from dataclasses import dataclass, replace

import core_tensor
import torch
from torch import Tensor

from quantease.problem.grid import Grid
from quantease.problem.problem import Problem


def upper_factor(sigma: Tensor, damping: float) -> Tensor:
    r"""Upper triangular R with $R R^\top = \Sigma + \lambda I$, $\lambda$ a fraction of the mean diagonal.

    Its inverse is GPTQ's factor: $U = R^{-1}$ has $U^\top U = (\Sigma + \lambda I)^{-1}$. With J the reversal of the
    order and $J (\Sigma + \lambda I) J = L L^\top$, it is $R = J L J$: one Cholesky factorisation.

    Args:
        sigma: $\Sigma$, shape (p, p).
        damping: $\lambda$ over the mean diagonal.

    Returns:
        R, shape (p, p).

    Raises:
        ValueError: If the damped matrix is not positive definite, not even in float64.
    """
    mean = sigma.diagonal().mean()
    damped = sigma.flip(0, 1)
    damped.diagonal().add_(damping * mean)
    damped.diagonal().masked_fill_(damped.diagonal() <= 0, 1.0)  # dead features
    L, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        L, info = torch.linalg.cholesky_ex(damped.double())
        if int(info):
            raise ValueError(f"damping: expected enough to make the Gram matrix positive definite, got {damping}")
    R: Tensor = L.to(sigma.dtype).flip(0, 1)
    return R


def gptq(problem: Problem, grid: Grid, *, damping: float = 0.01, act_order: bool = True, block: int = 256) -> Tensor:
    r"""Quantize feature by feature; the error of each is fed to those that are still open.

    $$ e_j = (w_j - q(w_j)) / U_{jj}, \qquad w_k \leftarrow w_k - U_{jk} e_j \quad (k > j). $$

    Departure: the textbook forms the inverse of $\Sigma$ and factorises that, and updates all open features after each
    block. Since $D = W - \hat W = U^\top E$ and $U^{-1} = R$, a block b enters with
    $w_b = W_b + U_{bb}^\top R_{<b,\,b}^\top D_{<b}$: the same numbers from one Cholesky factor of $\Sigma$, inverses
    of its diagonal blocks only, and products that write no more than the block.

    Args:
        problem: Weights and Gram matrix.
        grid: Scales and zero points, fixed beforehand (static groups).
        damping: Fraction of the mean diagonal added to the diagonal.
        act_order: Visit features by falling $\Sigma_{jj}$.
        block: Features per block.

    Returns:
        Codes, shape (q, p), uint8.

    Source: arXiv 2210.17323, Alg. 1; act-order and static groups as in the authors' code.
    """
    return _gptq(problem, grid, damping, act_order, block).codes


def gptq_with_gradient(
    problem: Problem, grid: Grid, *, damping: float = 0.01, act_order: bool = True, block: int = 256
) -> tuple[Tensor, Tensor]:
    r"""GPTQ and the gradient $D \Sigma$ of its result, for half of what the product would cost.

    With the scaled errors E and the factor R of the damped matrix it is
    $(\Sigma + \Lambda) D^\top = R R^\top U^\top E = R E$, a triangular product; $\Lambda$ is what damping added.

    Args:
        problem: Weights and Gram matrix.
        grid: Scales and zero points.
        damping: As in `gptq`.
        act_order: As in `gptq`.
        block: As in `gptq`.

    Returns:
        Codes, shape (q, p), uint8, and $(W - \hat W) \Sigma$, shape (q, p).
    """
    done = _gptq(problem, grid, damping, act_order, block)
    gradient = torch.empty_like(done.error)  # (p, q)
    for start in range(0, len(gradient), block):
        rows = slice(start, min(start + block, len(gradient)))
        torch.mm(done.factor[rows, start:], done.error[start:], out=gradient[rows])
    sigma = problem.sigma.diagonal()[done.order]
    added = done.factor.square().sum(1) - sigma  # the diagonal of R R' less that of Sigma
    gradient.addcmul_(added[:, None], done.residual, value=-1)
    return done.codes, gradient.index_select(0, torch.argsort(done.order)).T.contiguous()


@dataclass(frozen=True)
class _Run:
    codes: Tensor  # (q, p), natural order
    order: Tensor  # (p,); what follows is in this order
    factor: Tensor  # R, (p, p)
    error: Tensor  # E, (p, q)
    residual: Tensor  # D, (p, q)


def _gptq(problem: Problem, grid: Grid, damping: float, act_order: bool, block: int) -> _Run:
    features = problem.weight.shape[1]
    natural = torch.arange(features, device=problem.weight.device)
    order = torch.argsort(problem.energy, descending=True, stable=True) if act_order else natural
    key = (damping, act_order)
    if key not in problem.factors:  # the grids of one problem share it
        sigma = problem.sigma.index_select(0, order).index_select(1, order) if act_order else problem.sigma
        problem.factors[key] = upper_factor(sigma, damping)
    R = problem.factors[key]
    W = problem.weight.T.contiguous().index_select(0, order)  # (p, q); rows are gathered faster than columns
    D, E = torch.empty_like(W), torch.empty_like(W)
    scale, zero = grid.scale.T.contiguous().to(W), grid.zero.T.contiguous().to(W)  # (G, q)
    group = grid.group[order]
    for start in range(0, features, block):
        rows = slice(start, min(start + block, features))
        identity = torch.eye(rows.stop - start, dtype=W.dtype, device=W.device)
        U = torch.linalg.solve_triangular(R[rows, rows], identity, upper=True)
        entered = torch.addmm(W[rows], U.T, R[:start, rows].T @ D[:start])  # (B, q)
        quantized, E[rows] = core_tensor.gptq_block(entered, U, scale, zero, group[rows], grid.max_code)
        D[rows] = W[rows] - quantized
        W[rows] = quantized
    return _Run(_natural_order(W, order, grid), order, R, E, D)


def _natural_order(W: Tensor, order: Tensor, grid: Grid) -> Tensor:
    permuted = replace(grid, group=grid.group[order])
    codes = permuted.quantize(W.T)  # exact: W holds grid points
    return codes.index_select(1, torch.argsort(order))
