"""What a discriminator (and the adversarial baselines' generators) minimise, and the penalties on its gradients."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from frechet_gan.choices import DLoss
from frechet_gan.frechet.distance import frechet_distance
from frechet_gan.frechet.whitening import moments, whiten, whitener


def discriminator_loss(kind: DLoss, real: Tensor, fake: Tensor) -> Tensor:
    """Loss of a discriminator from its logits.

    Args:
        kind: `bce`, `hinge` or `wgan`.
        real: Logits of real images, shape (n,).
        fake: Logits of generated images, shape (m,).

    Returns:
        A scalar.
    """
    if kind == "bce":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return fake.mean() - real.mean()


def generator_loss(kind: DLoss, fake: Tensor) -> Tensor:
    """Adversarial loss of a generator: non-saturating with `bce`, the critic's mean otherwise.

    Args:
        kind: The discriminator's loss.
        fake: Logits of generated images, shape (n,).

    Returns:
        A scalar.
    """
    return F.softplus(-fake).mean() if kind == "bce" else -fake.mean()


def learned_encoder_loss(real: Tensor, fake: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Loss of an encoder that is to tell two samples apart: minus the logarithm of their whitened distance.

    Args:
        real: Features of real images, shape (n, d), with a graph.
        fake: Features of generated images, shape (m, d), with a graph.
        epsilon: Ridge of the whitening, relative to the mean variance.

    Returns:
        A scalar; whitening is differentiated too, so that a larger scale earns nothing.

    Source:
        arXiv 2608.11205.

    Departure:
        The logarithm replaces that paper's caps and trust region: it bounds the pull of a few far samples.
    """
    mean, covariance = moments(real)
    lower = whitener(covariance, epsilon)
    distance = frechet_distance(whiten(fake, mean, lower), whiten(real, mean, lower), ddof=0)
    return -torch.log1p(distance)


def r1_penalty(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    r"""R1: $\frac12 E \lVert\nabla_x D(x)\rVert^2$ on real images.

    Args:
        function: Maps images to one number each, shape (n,).
        images: Real images, shape (n, c, h, w).

    Returns:
        A scalar with a graph.

    Source:
        arXiv 1801.04406, Eq. 9.
    """
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(images).sum(), images, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean() / 2


def gradient_penalty(
    function: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, generator: torch.Generator
) -> Tensor:
    r"""WGAN-GP: $E (\lVert\nabla_x D(x)\rVert - 1)^2$ between real and generated images.

    Args:
        function: Maps images to one number each, shape (n,).
        real: Real images, shape (n, c, h, w).
        fake: Generated images, shape (n, c, h, w).
        generator: Draws the points between them.

    Returns:
        A scalar with a graph.

    Source:
        arXiv 1704.00028, Eq. 3.
    """
    t = torch.rand(real.shape[0], 1, 1, 1, generator=generator).to(real)
    between = (t * real + (1 - t) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(between).sum(), between, create_graph=True)
    penalty: Tensor = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return penalty
