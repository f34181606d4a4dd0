"""Spectra of a network's curvature: operators, top eigenvalues, traces and the spectral density."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from core_tensor.checks import check_number
from core_tensor.linalg.spectrum import SymmetricOperator, TraceEstimate, hutchinson_trace, lanczos, signs
from torch import Tensor, nn

from sgd_stability.curvature.data import Data, collect
from sgd_stability.curvature.gauss_newton import gauss_newton_operator
from sgd_stability.curvature.ghost import sample_blocks
from sgd_stability.curvature.losses import LossValues, resolve_loss
from sgd_stability.curvature.network import Network, make_network
from sgd_stability.curvature.truncated import loss_hessian_operator

__all__ = [
    "SpectralDensity",
    "exact_gauss_newton_trace",
    "gauss_newton_operator",
    "hutch_plus_plus",
    "hutchinson_trace",
    "lanczos",
    "loss_hessian_operator",
    "network_of",
    "spectral_density",
]


def network_of(
    model: nn.Module,
    loss: str | nn.Module | LossValues,
    data: Data,
    *,
    parameters: Iterable[str] | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> Network:
    """The network that the operators here take.

    Args:
        model: The model.
        loss: As in `analyze`.
        data: As in `analyze`.
        parameters: Names of the parameters to include, for the spectrum of a layer; all if absent.
        max_samples: Most samples to use; all if absent.
        seed: Seed of the subsample.

    Returns:
        The network.
    """
    samples = collect(data, max_samples=max_samples, seed=seed, like=next(model.parameters(), None))
    return make_network(model, resolve_loss(loss), samples.inputs, samples.targets, parameters)


def exact_gauss_newton_trace(network: Network) -> float:
    """The trace of the Gauss-Newton Hessian, exactly: mean over samples of ||Z_i||_F^2, without probes.

    Args:
        network: The network.

    Returns:
        The trace.
    """
    blocks, sign = sample_blocks(network), None if network.loss.convex else network.factor.signs
    diagonal = blocks.diagonal(dim1=1, dim2=2)  # (n, R)
    return float((diagonal if sign is None else diagonal * sign).sum(1).mean())


def hutch_plus_plus(
    operator: SymmetricOperator, products: int = 51, *, generator: torch.Generator | None = None
) -> TraceEstimate:
    """Hutch++: the exact trace on a random range of A, Hutchinson on what is left.

    Error falls like 1 / products for a decaying spectrum, where Hutchinson's falls like its square root.

    Args:
        operator: The operator A.
        products: Products to spend, at least 3; a third each for the range, its trace and the probes.
        generator: CPU generator.

    Returns:
        The estimate; its standard error is that of the remainder's probes.

    Source:
        arXiv 2010.09649, Algorithm 1.
    """
    check_number("products", products, low=3, integer=True)
    k = min(products // 3, operator.size)
    sketch = torch.stack([operator(signs(operator, generator)) for _ in range(k)], 1)  # (d, k)
    Q, _ = torch.linalg.qr(sketch)
    head = math.fsum(float(torch.dot(q, operator(q))) for q in Q.T)
    probes = max(products - 2 * k, 1)

    def rest(v: Tensor) -> Tensor:
        projected = v - Q @ (Q.T @ v)
        image = operator(projected)
        remainder: Tensor = image - Q @ (Q.T @ image)
        return remainder

    tail = hutchinson_trace(
        SymmetricOperator(rest, operator.size, operator.dtype, operator.device), probes, generator=generator
    )
    return TraceEstimate(head + tail.value, tail.standard_error, 2 * k + probes)


@dataclass(frozen=True)
class SpectralDensity:
    """Spectral density by stochastic Lanczos quadrature.

    Attributes:
        nodes: Ritz values of every probe, shape (probes * steps,).
        weights: Their weights, summing to one, shape (probes * steps,).
        size: Dimension of the operator.
    """

    nodes: Tensor
    weights: Tensor
    size: int

    def density(self, grid: Tensor, width: float) -> Tensor:
        """The density smoothed by a Gaussian.

        Args:
            grid: Eigenvalues to evaluate at, shape (m,).
            width: Standard deviation of the Gaussian.

        Returns:
            Shape (m,); integrates to one.
        """
        check_number("width", width, low=0, open_low=True)
        z = (grid.double()[:, None] - self.nodes) / width
        smooth: Tensor = (torch.exp(-(z**2) / 2) * self.weights).sum(1) / (width * math.sqrt(2 * math.pi))
        return smooth

    def moment(self, power: int) -> float:
        """The trace of A^power over d, exact in expectation up to power 2 steps - 1.

        Args:
            power: Exponent.

        Returns:
            The moment.
        """
        return float((self.nodes**power * self.weights).sum())


def spectral_density(
    operator: SymmetricOperator, *, probes: int = 4, steps: int = 40, generator: torch.Generator | None = None
) -> SpectralDensity:
    """Stochastic Lanczos quadrature.

    Args:
        operator: The operator A.
        probes: Random start vectors.
        steps: Products per start vector.
        generator: CPU generator.

    Returns:
        Nodes and weights.

    Source:
        Ubaru, Chen, Saad 2017, Algorithm 1 (SIAM J. Matrix Anal. Appl. 38).
    """
    check_number("probes", probes, low=1, integer=True)
    check_number("steps", steps, low=1, integer=True)
    nodes, weights = [], []
    for _ in range(probes):
        theta, tau = _quadrature(operator, signs(operator, generator), min(steps, operator.size))
        nodes.append(theta)
        weights.append(tau / probes)
    return SpectralDensity(torch.cat(nodes), torch.cat(weights), operator.size)


def _quadrature(operator: SymmetricOperator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    # Lanczos from one start; unlike `lanczos` it must not restart: the weights belong to this vector.
    basis = [start / start.norm()]
    diagonal, off = [], []
    for step in range(steps):
        image = operator(basis[-1])
        diagonal.append(float(torch.dot(basis[-1], image)))
        rows = torch.stack(basis)
        for _ in range(2):
            image = image - (rows @ image) @ rows
        beta = float(image.norm())
        if step == steps - 1 or beta <= 1e2 * torch.finfo(operator.dtype).eps * max(map(abs, diagonal)):
            break
        off.append(beta)
        basis.append(image / beta)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off:
        beside = torch.tensor(off, dtype=torch.float64)
        matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
    theta, rotation = torch.linalg.eigh(matrix)
    return theta, rotation[0].square()
