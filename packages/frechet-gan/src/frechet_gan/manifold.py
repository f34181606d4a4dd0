"""Fidelity and diversity apart: precision and recall, density and coverage, by nearest neighbours."""

from dataclasses import dataclass

import torch
from core_tensor.checks import check_number
from torch import Tensor

from frechet_gan.distance import check_pair
from frechet_gan.mmd import squared_distances


@dataclass(frozen=True)
class Manifold:
    """Four shares that compare the supports of two samples.

    Attributes:
        precision: Share of generated points inside the real manifold.
        recall: Share of real points inside the generated manifold.
        density: Mean number of real balls around a generated point, over k; may exceed one.
        coverage: Share of real balls that hold a generated point; low when modes are missing.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(fake: Tensor, real: Tensor, k: int = 5) -> Manifold:
    """Precision, recall, density and coverage: a manifold is the union of balls up to the k-th nearest neighbour.

    Args:
        fake: Generated features, shape (n, d).
        real: Real features, shape (m, d).
        k: Neighbour that sets the radius of a ball.

    Returns:
        The four shares.

    Raises:
        ValueError: If k is not below the number of rows of both samples.

    Source:
        arXiv 1904.06991 (precision, recall), arXiv 2002.09797 (density, coverage).
    """
    check_pair(fake, real)
    check_number("k", k, low=1, high=min(fake.shape[0], real.shape[0]) - 1, integer=True)
    fake, real = fake.detach().double(), real.detach().double()
    cross = squared_distances(fake, real)  # (n, m)
    radius_real = _radius(real, k)
    inside_real = cross <= radius_real  # (n, m)
    inside_fake = cross <= _radius(fake, k)[:, None]
    return Manifold(
        precision=float(inside_real.any(1).double().mean()),
        recall=float(inside_fake.any(0).double().mean()),
        density=float(inside_real.double().sum(1).mean() / k),
        coverage=float((cross.min(0).values <= radius_real).double().mean()),
    )


def _radius(x: Tensor, k: int) -> Tensor:
    squares = squared_distances(x, x)
    squares.fill_diagonal_(-1.0)  # the point itself comes first, whatever round-off says
    return torch.kthvalue(squares, k + 1, dim=1).values
