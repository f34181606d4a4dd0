r"""The layer objective, row by row: $f_i = (w_i - \hat w_i)^\top \Sigma\, (w_i - \hat w_i)$."""

import torch
from torch import Tensor

_PANEL = 256


def row_objective(residual: Tensor, sigma: Tensor) -> Tensor:
    r"""Objective of every row, in float64.

    Args:
        residual: $D = W - \hat W$, shape (q, p).
        sigma: Gram matrix, symmetric, shape (p, p); entries below its diagonal blocks are not looked at.

    Returns:
        $f$, shape (q,), float64; what rounding makes negative is 0.
    """
    D, S = residual.double(), sigma.double()
    total = D.new_zeros(len(D))
    for start in range(0, S.shape[0], _PANEL):  # each pair of features once: little over half of the product D Sigma
        columns = slice(start, start + _PANEL)
        pull = torch.addmm(D[:, columns] @ S[columns, columns], D[:, :start], S[:start, columns], alpha=2)
        total += torch.linalg.vecdot(pull, D[:, columns])
    return total.clamp_min_(0.0)


def relative_error(weight: Tensor, approximation: Tensor, sigma: Tensor) -> float:
    r"""$\|(W - \hat W) X\|_F^2 / \|W X\|_F^2$ for inputs with Gram matrix $\Sigma = X X^\top$.

    Args:
        weight: W, shape (q, p).
        approximation: $\hat W$, shape (q, p).
        sigma: Gram matrix of calibration tokens or of others, shape (p, p).

    Returns:
        The ratio; 0 where the layer's output is zero and exactly reproduced, infinity where it is zero and is not.
    """
    error = float(row_objective(weight.double() - approximation.double(), sigma).sum())
    size = float(row_objective(weight, sigma).sum())
    if size == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / size
