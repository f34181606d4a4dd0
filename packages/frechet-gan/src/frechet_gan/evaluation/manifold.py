"""Fidelity and diversity apart: precision and recall, density and coverage, by nearest neighbours."""

from dataclasses import dataclass

import torch
from core_tensor.checks import check_number
from torch import Tensor

from frechet_gan.frechet.distance import check_pair
from frechet_gan.transport.mmd import BLOCK, squared_distances


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

    Distances are formed in blocks of rows, so that memory grows with n + m and not with their product.

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
    n, m = fake.shape[0], real.shape[0]
    radius_fake, radius_real = _radius(fake, k), _radius(real, k)
    precise = balls = 0
    recalled = torch.zeros(m, dtype=torch.bool, device=real.device)
    nearest = torch.full_like(radius_real, torch.inf)
    for rows, radius in zip(fake.split(BLOCK), radius_fake.split(BLOCK), strict=True):
        cross = squared_distances(rows, real)  # (block, m)
        inside = cross <= radius_real
        precise += int(inside.any(1).sum())
        balls += int(inside.sum())
        recalled |= (cross <= radius[:, None]).any(0)
        nearest = torch.minimum(nearest, cross.min(0).values)
    return Manifold(
        precision=precise / n,
        recall=float(recalled.double().mean()),
        density=balls / (n * k),
        coverage=float((nearest <= radius_real).double().mean()),
    )


def memorized_share(fake: Tensor, real: Tensor) -> float:
    """Share of generated points that are copies, or nearly: closer to a real point than half its nearest neighbor is.

    A sample of the real law that was drawn anew has a share of 2^-k / (1 + 2^-k), k its intrinsic dimension: below 0.12
    from three dimensions on. The training data themselves have 1.

    Args:
        fake: Generated features, shape (n, d).
        real: Real features the generator was trained on, shape (m, d).

    Returns:
        The share.

    Source:
        arXiv 2102.08921 calls such points not authentic, with a factor of 1 instead of the 1/2 used here: with 1, an
        average of many images passes for a copy in high dimensions.
    """
    check_pair(fake, real)
    fake, real = fake.detach().double(), real.detach().double()
    reach = _radius(real, 1)
    size = float(real.square().sum(1).mean())
    copies = 0
    for rows in fake.split(BLOCK):
        nearest = squared_distances(rows, real).min(1)
        limit = (reach[nearest.indices] / 4).clamp_min(1e-12 * size)  # round-off of a copy
        copies += int((nearest.values <= limit).sum())
    return copies / fake.shape[0]


def _radius(x: Tensor, k: int) -> Tensor:
    # squared distance of every row to its k-th neighbour
    radii = []
    for first, rows in enumerate(x.split(BLOCK)):
        squares = squared_distances(rows, x)  # (block, n)
        own = torch.arange(rows.shape[0], device=x.device)
        squares[own, own + first * BLOCK] = -1.0  # the point itself comes first, whatever round-off says
        radii.append(torch.kthvalue(squares, k + 1, dim=1).values)
    return torch.cat(radii)
