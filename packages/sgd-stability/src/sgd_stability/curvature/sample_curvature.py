"""The largest curvature of single samples, lambda1(H_i), and the directions that have it."""

from dataclasses import dataclass

import torch
from core_tensor.linalg.spectrum import Eigenpairs, lanczos
from torch import Tensor

from sgd_stability.curvature.gauss_newton import gauss_newton_operator
from sgd_stability.curvature.ghost import sample_blocks
from sgd_stability.curvature.jacobian import pulled
from sgd_stability.curvature.network import Network


@dataclass(frozen=True)
class Effort:
    """What the curvature of a sample may cost.

    Attributes:
        block: Rank R up to which the (R, R) blocks Z_i Z_i' are formed; above it Lanczos runs on every sample.
        tolerance: Relative residual of Lanczos.
        max_steps: Most products.
    """

    block: int = 256
    tolerance: float = 1e-3
    max_steps: int = 60


FULL = Effort()
QUICK = Effort(block=32, tolerance=0.05, max_steps=5)
"""For the monitor, which has a start: an error of a few percent, from below, for a tenth of the products."""


def sample_curvature(
    network: Network, *, scale: Tensor | None = None, effort: Effort = FULL, start: Tensor | None = None
) -> Tensor:
    """lambda1(H_i) of every sample's Gauss-Newton Hessian.

    Args:
        network: The network; its ranks share the samples.
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,).
        effort: Where blocks end and Lanczos begins, and how far it goes.
        start: Where Lanczos starts, shape (d,); a random vector if absent.

    Returns:
        Shape (n,), float64.
    """
    if network.rank > effort.block:

        def top(first: int, last: int) -> Tensor:
            return torch.cat([_top(network, i, scale, effort, start).values for i in range(first, last)])

        return network.ranks.rows(network.n, top)
    blocks = sample_blocks(network, scale=scale)
    signs = None if network.loss.convex else network.factor.signs
    if signs is None:
        psd: Tensor = torch.linalg.eigvalsh(blocks)[:, -1].clamp_min(0)
        return psd
    lam, U = torch.linalg.eigh(blocks)
    root = (U * lam.clamp_min(0).sqrt()[:, None]) @ U.mT  # similar to Z' diag(signs) Z away from zero
    largest: Tensor = torch.linalg.eigvalsh(root @ (signs.double()[:, :, None] * root))[:, -1]
    return largest


def sample_directions(
    network: Network,
    curvature: Tensor,
    count: int,
    *,
    scale: Tensor | None = None,
    effort: Effort = FULL,
    start: Tensor | None = None,
) -> Tensor:
    """Top eigenvectors of the most curved per-sample Hessians.

    Args:
        network: The network.
        curvature: lambda1(H_i), shape (n,).
        count: How many samples.
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,).
        effort: How far Lanczos goes.
        start: Where it starts, shape (d,); a random vector if absent.

    Returns:
        Unit columns, shape (d, count).
    """
    worst = curvature.topk(min(count, network.n)).indices
    if network.rank > effort.block or not network.loss.convex:
        return torch.cat([_top(network, i, scale, effort, start).vectors for i in worst.tolist()], 1)
    # Z_i'u for the top eigenvector u of Z_i Z_i': one pass back per sample
    some = network.select(worst.to(network.targets.device))
    u = torch.linalg.eigh(sample_blocks(some, scale=scale))[1][:, :, -1:]
    rows = pulled(some, some.factor.times(u.to(some.outputs)).mT)[:, 0].to(network.dtype)  # (count, d)
    rows = rows if scale is None else rows * scale
    rows /= rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return rows.T


def _top(network: Network, i: int, scale: Tensor | None, effort: Effort, start: Tensor | None) -> Eigenpairs:
    operator = gauss_newton_operator(network.part(i, i + 1), scale=scale)
    generator = torch.Generator().manual_seed(i)
    return lanczos(operator, tolerance=effort.tolerance, max_steps=effort.max_steps, start=start, generator=generator)
