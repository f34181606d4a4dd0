r"""Almost-sure stability: the top Lyapunov exponent of the random product, by simulation in the family's coordinates.

    gamma = lim (1/t) log ||(I - eta G_t) ... (I - eta G_1) delta_0||.

Almost every path decays if gamma < 0. By Jensen gamma <= log(radius) / 2, so the mean-square threshold is never above
the almost-sure one; between the two, typical paths decay while rare ones carry the second moment to infinity.
"""

import math
from dataclasses import dataclass

import torch
from core_tensor.checks import check_number
from torch import Tensor

from sgd_stability.theory.dynamics import SGD, Update
from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.quadratic import minibatch_product
from sgd_stability.theory.sampling import Sampling
from sgd_stability.theory.second_moment import lr_threshold


@dataclass(frozen=True)
class LyapunovExponent:
    """A simulated growth rate per step.

    Attributes:
        value: Mean over the paths of (1/t) log of the growth.
        standard_error: Of that mean.
    """

    value: float
    standard_error: float


def lyapunov_exponent(
    family: CurvatureFamily,
    lr: float,
    sampling: Sampling,
    *,
    update: Update = SGD,
    steps: int = 2000,
    paths: int = 16,
    seed: int = 0,
) -> LyapunovExponent:
    """Top Lyapunov exponent of linearised training.

    Args:
        family: The per-sample Hessians; a truncated family gives a lower bound in practice, not a certified one.
        lr: Learning rate eta.
        sampling: Minibatch scheme; drawn over the family's samples, at the family's n.
        update: Update rule.
        steps: Steps per path; the first tenth is not counted.
        paths: Independent paths.
        seed: Seed; the same one gives the same minibatches at every learning rate.

    Returns:
        The exponent per step.

    Raises:
        ValueError: If an argument is out of range, or the sampling's n is not the family's.
    """
    check_number("lr", lr, low=0, open_low=True)
    check_number("steps", steps, low=10, integer=True)
    check_number("paths", paths, low=2, integer=True)
    if sampling.n != family.n:
        raise ValueError(f"sampling: expected n = {family.n}, the family's, got {sampling.n}")
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(2, paths, len(family.h), generator=generator, dtype=torch.float64)  # delta and velocity
    logs = torch.zeros(paths, dtype=torch.float64)
    burn = steps // 10
    for step in range(steps):
        state = _step(family, state, lr, sampling.draw(paths, generator), update)
        norms = state.square().sum((0, 2)).sqrt()
        if bool((norms == 0).any()):  # a step that maps everything to zero, exactly
            return LyapunovExponent(-math.inf, 0.0)
        state = state / norms[:, None]
        if step >= burn:
            logs += norms.log()
    rates = logs / (steps - burn)
    return LyapunovExponent(float(rates.mean()), float(rates.std()) / math.sqrt(paths))


def almost_sure_threshold(
    family: CurvatureFamily,
    sampling: Sampling,
    *,
    steps: int = 2000,
    paths: int = 16,
    seed: int = 0,
    tolerance: float = 1e-2,
) -> float:
    """The learning rate at which typical paths of linearised SGD stop decaying, by bisection on common minibatches.

    Args:
        family: The per-sample Hessians, positive semidefinite.
        sampling: Minibatch scheme.
        steps: Steps per path.
        paths: Independent paths.
        seed: Seed.
        tolerance: Relative width to stop at; the simulation's own error comes on top.

    Returns:
        The threshold; infinite if paths still decay at 64 times the mean-square threshold.
    """
    check_number("tolerance", tolerance, low=0, open_low=True)
    low = lr_threshold(family, sampling).value
    if low in {0.0, math.inf}:
        return low

    def grows(lr: float) -> bool:
        return lyapunov_exponent(family, lr, sampling, steps=steps, paths=paths, seed=seed).value > 0

    high, limit = 2 * low, 64 * low
    while not grows(high):
        low, high = high, 2 * high
        if high > limit:
            return math.inf
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if grows(middle) else (middle, high)
    return math.sqrt(low * high)


def _step(family: CurvatureFamily, state: Tensor, lr: float, weights: Tensor, update: Update) -> Tensor:
    # One step of `torch.optim.SGD` (or SGDW) on the linearised problem; the velocity is in units of the weights.
    delta, velocity = state  # velocity is lr * buffer
    gradient = minibatch_product(family, weights, delta)
    if not update.decoupled:
        gradient = gradient + update.weight_decay * delta
    velocity = update.momentum * velocity + (1 - update.dampening) * lr * gradient
    move = lr * gradient + update.momentum * velocity if update.nesterov else velocity
    keep = 1 - lr * update.weight_decay if update.decoupled else 1.0
    return torch.stack([keep * delta - move, velocity])
