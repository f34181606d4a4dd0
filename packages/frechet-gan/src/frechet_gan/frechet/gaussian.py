r"""The optimal map between two Gaussians and the Frechet distance of Gaussians given by their moments."""

from dataclasses import dataclass

import torch
from core_tensor.checks import check_tensor
from torch import Tensor

from frechet_gan.frechet.factors import Factor, congruence, triangular_root


@dataclass(frozen=True)
class GaussianMap:
    r"""Monge map $m(x) = \mu_r + T (x - \mu)$ that carries $N(\mu, \Sigma)$ to $N(\mu_r, \Sigma_r)$.

    Attributes:
        source: μ, shape (d,).
        target: μ_r, shape (d,).
        matrix: T, symmetric and positive semidefinite, shape (d, d).
        distance: Frechet distance of the two Gaussians, a scalar.
    """

    source: Tensor
    target: Tensor
    matrix: Tensor
    distance: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Transport points.

        Args:
            x: Points, shape (n, d).

        Returns:
            Images m(x), shape (n, d), in the dtype of the map.
        """
        return self.target + (x.to(self.matrix.dtype) - self.source) @ self.matrix


def gaussian_map(mean: Tensor, covariance: Tensor, target_mean: Tensor, target_covariance: Tensor) -> GaussianMap:
    r"""Optimal transport map between Gaussians.

    With $\Sigma_r = R R^T$ and $R^T \Sigma R = V \Lambda V^T$ the map is
    $T = R V \Lambda^{-1/2} V^T R^T$ (pseudo-inverse on the null space), so that $T \Sigma T = \Sigma_r$.

    Args:
        mean: μ, shape (d,).
        covariance: Σ, shape (d, d).
        target_mean: μ_r, shape (d,).
        target_covariance: Σ_r, shape (d, d).

    Returns:
        The map, in float64.

    Raises:
        ValueError: If the shapes differ or a value is not finite.
    """
    check_moments("mean", mean, "covariance", covariance)
    check_moments("target_mean", target_mean, "target_covariance", target_covariance, width=mean.shape[0])
    return map_to_root(mean, covariance, Factor(target_mean.detach().double(), triangular_root(target_covariance)))


def map_to_root(mean: Tensor, covariance: Tensor, target: Factor) -> GaussianMap:
    """`gaussian_map` to a Gaussian whose covariance's root is at hand.

    Args:
        mean: μ, shape (d,).
        covariance: Σ, shape (d, d).
        target: Mean and upper triangular factor of the target.

    Returns:
        The map, in float64.
    """
    mean, covariance = mean.detach().double(), covariance.detach().double()
    root = target.factor / target.scale  # (d, d)
    values, vectors = torch.linalg.eigh(congruence(root, covariance))
    values = values.clamp_min(0)
    kept = values > values.max() * values.shape[0] * torch.finfo(torch.float64).eps
    inverse_root = torch.where(kept, values, torch.inf).rsqrt()
    half = (root.mT @ vectors) * inverse_root.sqrt()  # (d, d)
    matrix = half @ half.mT
    traces = covariance.diagonal().sum() + target.trace()
    distance = (mean - target.mean).square().sum() + (traces - 2 * values.sqrt().sum()).clamp_min(0)
    return GaussianMap(mean, target.mean, matrix, distance)


def frechet_distance_from_moments(mean_x: Tensor, covariance_x: Tensor, mean_y: Tensor, covariance_y: Tensor) -> Tensor:
    r"""Frechet distance of two Gaussians.

    $$ d^2 = \lVert\mu_x-\mu_y\rVert^2 + \operatorname{tr}(\Sigma_x+\Sigma_y)
           - 2 \operatorname{tr}(\Sigma_x\Sigma_y)^{1/2} $$

    The root's trace is the sum of the roots of the eigenvalues of the symmetric $R^T \Sigma_y R$ with
    $\Sigma_x = R R^T$ (Cholesky), never of the non-symmetric product: real, and three times cheaper.

    Args:
        mean_x: Mean, shape (d,).
        covariance_x: Covariance, shape (d, d).
        mean_y: Mean, shape (d,).
        covariance_y: Covariance, shape (d, d).

    Returns:
        The distance, a non-negative float64 scalar; no gradient passes (use samples for that).

    Raises:
        ValueError: If the shapes differ or a value is not finite.

    Source:
        Dowson and Landau 1982, Eq. 4.
    """
    check_moments("mean_x", mean_x, "covariance_x", covariance_x)
    check_moments("mean_y", mean_y, "covariance_y", covariance_y, width=mean_x.shape[0])
    return distance_to_root(mean_y, covariance_y, Factor(mean_x.detach().double(), triangular_root(covariance_x)))


def distance_to_root(mean: Tensor, covariance: Tensor, other: Factor) -> Tensor:
    """Frechet distance to a Gaussian whose covariance's root is at hand.

    Args:
        mean: Mean, shape (d,).
        covariance: Covariance, shape (d, d).
        other: Mean and upper triangular factor of the other Gaussian.

    Returns:
        The distance, a non-negative float64 scalar; no gradient passes.
    """
    mean, covariance = mean.detach().double(), covariance.detach().double()
    values = torch.linalg.eigvalsh(congruence(other.factor, covariance))
    root = values.clamp_min(0).sqrt().sum() / other.scale
    traces = covariance.diagonal().sum() + other.trace()
    distance: Tensor = (mean - other.mean).square().sum() + (traces - 2 * root).clamp_min(0)
    return distance


def check_moments(mean_name: str, mean: Tensor, name: str, covariance: Tensor, width: int | None = None) -> None:
    """Refuse moments of the wrong shape, or with NaN or infinite entries.

    Args:
        mean_name: The mean's argument name.
        mean: Mean, shape (d,).
        name: The covariance's argument name.
        covariance: Covariance, shape (d, d).
        width: d, where it is known already.
    """
    check_tensor(mean_name, mean, shape=(width,), finite=True, nonempty=True)
    check_tensor(name, covariance, shape=(mean.shape[0], mean.shape[0]), finite=True)
