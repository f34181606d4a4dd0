"""Does the linear theory hold for the real, nonlinear run? Train to a minimum, perturb, run SGD, and look."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from core_tensor.checks import check_number
from torch import Tensor, nn

from sgd_stability.curvature.jacobian import output_jacobian
from sgd_stability.curvature.losses import SampleLoss, resolve_loss
from sgd_stability.curvature.network import Inputs, call, make_network, take

LEAVES = 2.0
"""A run leaves its minimum if its distance from it ever exceeds this many times the initial one, or ..."""
LOSS_LEAVES = 10.0
"""... its final loss exceeds this many times the first: a sharp direction shows in the loss before the distance."""


@dataclass(frozen=True)
class Trial:
    """One run of SGD near a minimum.

    Attributes:
        lr: Learning rate.
        batch_size: Batch size.
        seed: Seed of perturbation and minibatches.
        distance: Largest distance from the minimum on the way, over the initial one.
        final_loss: Mean loss at the end.
        outcome: `"returns"` or `"leaves"`, by the criteria `LEAVES` and `LOSS_LEAVES`.
        first_loss: Mean loss after the perturbation, before the first step.
    """

    lr: float
    batch_size: int
    seed: int
    distance: float
    final_loss: float
    outcome: Literal["returns", "leaves"]
    first_loss: float = math.nan


def interpolate(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: str = "squared_error",
    epochs: int = 300,
    lr: float = 1e-2,
    target_loss: float = 1e-20,
    max_newton: int = 60,
) -> float:
    """Train to an interpolating minimum of a squared error: Adam for a while, then Levenberg-Marquardt to rounding.

    Args:
        model: The model, in float64; more parameters than outputs.
        inputs: Inputs, shape (n, ...).
        targets: Targets, of the outputs' shape.
        loss: `"squared_error"` or `"mse"`.
        epochs: Full-batch steps of Adam.
        lr: Adam's learning rate.
        target_loss: Stop when the mean loss is below.
        max_newton: Most Levenberg-Marquardt steps.

    Returns:
        The mean loss reached.
    """
    network = make_network(model, resolve_loss(loss), inputs, targets)
    parameters = list(network.parameters.values())
    adam = torch.optim.Adam(parameters, lr=lr)
    for _ in range(epochs):
        adam.zero_grad()
        network.loss.values(call(model, inputs), targets).mean().backward()
        adam.step()
    damping = 1e-3
    current = _mean_loss(model, network.loss, inputs, targets)
    for _ in range(max_newton):
        if current <= target_loss:
            break
        J = output_jacobian(make_network(model, network.loss, inputs, targets), chunk=64).flatten(0, 1)  # (n O, d)
        with torch.no_grad():
            residual = (call(model, inputs) - targets).reshape(-1)
            K = J @ J.T
            scale = K.diagonal().mean()
            before = torch.nn.utils.parameters_to_vector(parameters)
            while damping < 1e6:
                shifted = K + damping * scale * torch.eye(len(K), dtype=K.dtype)
                step = J.T @ torch.linalg.solve(shifted, residual)
                torch.nn.utils.vector_to_parameters(before - step, parameters)
                after = _mean_loss(model, network.loss, inputs, targets)
                if after < current:
                    current, damping = after, damping / 10
                    break
                damping *= 10
            else:
                torch.nn.utils.vector_to_parameters(before, parameters)
                break
    model.zero_grad()
    return current


def run_sgd(
    model: nn.Module,
    loss: str | SampleLoss,
    inputs: Inputs,
    targets: Tensor,
    *,
    lr: float,
    batch_size: int,
    seed: int = 0,
    steps: int = 1200,
    perturbation: float = 1e-3,
) -> Trial:
    """Perturb the parameters, run SGD without replacement, put the parameters back.

    Args:
        model: The model at its minimum.
        loss: The loss.
        inputs: Inputs.
        targets: Targets.
        lr: Learning rate.
        batch_size: Batch size; every step draws a fresh batch of distinct samples.
        seed: Seed.
        steps: Steps.
        perturbation: Standard deviation of the perturbation of every parameter.

    Returns:
        What happened.
    """
    check_number("lr", lr, low=0, open_low=True)
    check_number("batch_size", batch_size, low=1, high=len(targets), integer=True)
    resolved = resolve_loss(loss) if isinstance(loss, str) else loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    minimum = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=perturbation)
    first = largest = _distance(parameters, minimum)
    first_loss = _mean_loss(model, resolved, inputs, targets)
    try:
        for step in range(steps):
            batch = torch.randperm(len(targets), generator=generator)[:batch_size]
            value = resolved.values(call(model, take(inputs, batch)), targets[batch]).mean()
            gradients = torch.autograd.grad(value, parameters)
            with torch.no_grad():
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.sub_(gradient, alpha=lr)
            if step % 5 == 4 or step == steps - 1:
                largest = max(largest, _distance(parameters, minimum))
                if not largest < 1e6 * first:  # also catches NaN
                    break
        final = _mean_loss(model, resolved, inputs, targets)
    finally:
        with torch.no_grad():
            for p, w in zip(parameters, minimum, strict=True):
                p.copy_(w)
    ratio = largest / first
    returns = ratio <= LEAVES and final <= LOSS_LEAVES * first_loss  # NaN is neither
    return Trial(lr, batch_size, seed, ratio, final, "returns" if returns else "leaves", first_loss)


def verify(
    model: nn.Module,
    loss: str | SampleLoss,
    inputs: Inputs,
    targets: Tensor,
    thresholds: dict[int, float],
    *,
    factors: Sequence[float] = (0.8, 1.2),
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 1200,
) -> list[Trial]:
    """Run SGD below and above predicted thresholds.

    Args:
        model: The model at its minimum.
        loss: The loss.
        inputs: Inputs.
        targets: Targets.
        thresholds: Predicted threshold by batch size.
        factors: Multiples of the threshold to run at.
        seeds: Seeds.
        steps: Steps per run.

    Returns:
        One trial per batch size, factor and seed.
    """
    return [
        run_sgd(model, loss, inputs, targets, lr=factor * rate, batch_size=B, seed=seed, steps=steps)
        for B, rate in thresholds.items()
        for factor in factors
        for seed in seeds
    ]


def _distance(parameters: Sequence[Tensor], minimum: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return math.sqrt(sum(float((p - w).square().sum()) for p, w in zip(parameters, minimum, strict=True)))


def _mean_loss(model: nn.Module, loss: SampleLoss, inputs: Inputs, targets: Tensor) -> float:
    with torch.no_grad():
        return float(loss.values(call(model, inputs), targets).mean())
