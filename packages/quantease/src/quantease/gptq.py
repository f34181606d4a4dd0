"""GPTQ with act-order and static groups: error feedback along the inverse's Cholesky factor."""

from dataclasses import replace

import core_tensor
import torch
from torch import Tensor

from quantease.grid import Grid
from quantease.problem import Problem


def inverse_factor(sigma: Tensor, damping: float) -> Tensor:
    r"""Upper triangular U with $U^\top U = (\Sigma + \lambda I)^{-1}$, $\lambda$ a fraction of the mean diagonal.

    With J the reversal of the order, $J (\Sigma + \lambda I) J = L L^\top$ gives $U = (J L J)^{-1}$: one Cholesky
    factorisation and one triangular inverse, where the textbook takes two factorisations and a full inverse.

    Args:
        sigma: $\Sigma$, shape (p, p).
        damping: $\lambda$ over the mean diagonal.

    Returns:
        U, shape (p, p).

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
    R = L.flip(0, 1)
    identity = torch.eye(R.shape[0], dtype=R.dtype, device=R.device)
    U: Tensor = torch.linalg.solve_triangular(R, identity, upper=True).to(sigma.dtype)
    return U


def gptq(problem: Problem, grid: Grid, *, damping: float = 0.01, act_order: bool = True, block: int = 128) -> Tensor:
    r"""Quantize feature by feature; the error of each is fed to those that are still open.

    $$ e_j = (w_j - q(w_j)) / U_{jj}, \qquad w_k \leftarrow w_k - U_{jk} e_j \quad (k > j). $$

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
    features = problem.weight.shape[1]
    order = torch.argsort(problem.energy, descending=True, stable=True) if act_order else torch.arange(features)
    U = inverse_factor(problem.sigma[order][:, order] if act_order else problem.sigma, damping)
    W = problem.weight.T[order].contiguous()  # (p, q)
    scale, zero = grid.scale.T.contiguous().to(W), grid.zero.T.contiguous().to(W)  # (G, q)
    group = grid.group[order]
    for start in range(0, features, block):
        stop = min(start + block, features)
        inner = U[start:stop, start:stop].contiguous()
        W[start:stop], error = core_tensor.gptq_block(
            W[start:stop], inner, scale, zero, group[start:stop], grid.max_code
        )
        W[stop:].addmm_(U[start:stop, stop:].T, error, alpha=-1)
    return _natural_order(W, order, grid)


def _natural_order(W: Tensor, order: Tensor, grid: Grid) -> Tensor:
    permuted = replace(grid, group=grid.group[order])
    codes = permuted.quantize(W.T)  # exact: W holds grid points
    return codes[:, torch.argsort(order)]
