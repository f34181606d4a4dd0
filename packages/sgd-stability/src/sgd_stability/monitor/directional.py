"""Sharpness along the way training goes: of one batch along its gradient, and of the loss along the last update."""

import math
from collections.abc import Callable, Sequence

import torch
from core_tensor.linalg.spectrum import flatten
from torch import Tensor

from sgd_stability.curvature.network import Network, call
from sgd_stability.curvature.truncated import loss_hessian_operator


def batch_sharpness(network: Network) -> float:
    """G'H g / ||g||^2 of a batch; SGD at the edge of stability holds its mean at 2 / eta.

    Args:
        network: The model on the batch.

    Returns:
        The batch sharpness; NaN where the gradient vanishes.

    Source:
        arXiv 2412.20553.
    """
    with torch.enable_grad():
        loss = network.loss.values(call(network.model, network.inputs), network.targets).mean()
        g = flatten(torch.autograd.grad(loss, list(network.parameters.values()), materialize_grads=True))
    g = g.to(network.dtype)
    squared = float(g.square().sum())
    return float(torch.dot(g, loss_hessian_operator(network)(g))) / squared if squared > 0 else math.nan


def critical_sharpness(network: Network, before: Sequence[Tensor], lr: float, *, evaluations: int = 10) -> float:
    """2 / eta_c, with eta_c the least rate at which the last update would have raised the loss; forward passes only.

    Args:
        network: The model on the samples the loss is evaluated on; its parameters are as the update left them.
        before: The parameters before the update.
        lr: Learning rate of the update.
        evaluations: Most forward passes; the rate is bracketed by factors of 4, then bisected.

    Returns:
        The critical sharpness; 0 if no rate tried raised the loss, infinite if every one did, NaN if nothing moved.

    Source:
        arXiv 2601.16979.
    """
    parameters = list(network.parameters.values())
    after = [p.detach().clone() for p in parameters]
    if lr <= 0 or all(torch.equal(a, b) for a, b in zip(after, before, strict=True)):
        return math.nan

    def loss(factor: float) -> float:
        for p, a, b in zip(parameters, after, before, strict=True):
            p.copy_(b + factor * (a - b))
        return float(network.loss.values(call(network.model, network.inputs), network.targets).mean())

    with torch.no_grad():
        try:
            factor = _crossing(loss, evaluations)
        finally:
            for p, a in zip(parameters, after, strict=True):
                p.copy_(a)
    return 2 / (factor * lr) if factor > 0 else math.inf


def _crossing(loss: Callable[[float], float], evaluations: int) -> float:
    # The multiple of the update at which the loss is back where it was: 0 if it only rose, infinite if it only fell.
    start = loss(0.0)
    factor, left = 1.0, evaluations - 2
    raises = not loss(factor) <= start
    low, high = (0.0, factor) if raises else (factor, math.inf)
    while left > 0 and (low == 0.0 or high == math.inf):
        factor = factor / 4 if raises else factor * 4
        low, high = (low, factor) if not loss(factor) <= start else (factor, high)
        left -= 1
    if low == 0.0 or high == math.inf:
        return 0.0 if low == 0.0 else math.inf
    for _ in range(left):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if not loss(middle) <= start else (middle, high)
    return math.sqrt(low * high)
