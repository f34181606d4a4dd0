"""Whitening by the real features, which makes a loss in a learned feature space independent of that space's scale."""

import torch
from torch import Tensor


def whitener(covariance: Tensor, epsilon: float = 1e-3) -> Tensor:
    r"""The factor $L$ with $L L^T = \Sigma_r + \epsilon \bar\lambda I$, $\bar\lambda$ the mean variance.

    The Frechet distance does not see the rotation by which Cholesky differs from the symmetric root.

    Args:
        covariance: Covariance of the real features, shape (d, d).
        epsilon: Ridge, relative to the mean variance.

    Returns:
        L, lower triangular, shape (d, d), float64, differentiable.

    Source:
        AdvFD, arXiv 2608.11205.
    """
    covariance = covariance.double()
    ridge = epsilon * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    lower: Tensor = torch.linalg.cholesky(covariance + ridge * identity)
    return lower


def whiten(x: Tensor, mean: Tensor, lower: Tensor) -> Tensor:
    """Map features by L⁻¹(x - μ_r); as both samples are mapped alike, the distance of equal ones stays zero.

    Args:
        x: Features, shape (n, d).
        mean: Mean of the real features, shape (d,).
        lower: L of `whitener`, shape (d, d).

    Returns:
        Whitened features, shape (n, d), float64, differentiable in all arguments.
    """
    solved: Tensor = torch.linalg.solve_triangular(lower, (x.double() - mean).mT, upper=False)
    return solved.mT


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance (divisor n) of a sample, differentiable.

    Args:
        x: Features, shape (n, d).

    Returns:
        Mean (d,) and covariance (d, d), float64.
    """
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.mT @ centred / x.shape[0]
