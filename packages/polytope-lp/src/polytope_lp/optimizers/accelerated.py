r"""Accelerated projected gradient with backtracking on the Lipschitz constant and restart on the gradient's sign.

Source: arXiv 2103.05277 (accelerated gradient descent). Departure: the original pairs gradients taken at x with steps
in y when it estimates the constant, caps the step, and never restarts; here the constant is found by backtracking
(doubled on failure, lowered by 5 % on success) and momentum restarts when it points uphill (O'Donoghue and Candes).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polytope_lp.optimizers.lbfgs import Objective
from polytope_lp.optimizers.vectors import dot, norm


@dataclass(frozen=True)
class AcceleratedState:
    """State of a run.

    Attributes:
        point: Current point, shape (n,), float64.
        value: Objective there (at the extrapolated point it was last evaluated at).
        extrapolated: Point at which the next gradient is taken.
        gradient: Gradient at `extrapolated`.
        momentum: Nesterov's t.
        lipschitz: Estimate of the Lipschitz constant of the gradient.
        decrement: Decrease that the last step promised.
        stalled: Whether backtracking found no acceptable step.
    """

    point: Tensor
    value: float
    extrapolated: Tensor
    gradient: Tensor
    momentum: float
    lipschitz: float
    decrement: float = float("inf")
    stalled: bool = False


def start(objective: Objective, point: Tensor, lipschitz: float) -> AcceleratedState:
    """Evaluate a starting point.

    Args:
        objective: Value and gradient of a point.
        point: Where to start, shape (n,), float64.
        lipschitz: First guess of the Lipschitz constant.

    Returns:
        A state without momentum.
    """
    value, gradient = objective(point)
    return AcceleratedState(point, value, point, gradient, 1.0, lipschitz)


def step(objective: Objective, state: AcceleratedState, free: Tensor, trials: int = 60) -> AcceleratedState:
    """One accelerated step with backtracking.

    Args:
        objective: Value and gradient of a point.
        state: State of the run.
        free: Coordinates without a sign, shape (n,), bool.
        trials: Most doublings of the Lipschitz constant.

    Returns:
        The next state; `stalled` when no constant was large enough.
    """
    lipschitz, y = state.lipschitz, state.extrapolated
    for _ in range(trials):
        raw = y - state.gradient / lipschitz
        point = torch.where(free, raw, raw.clamp_min(0))
        move = point - y
        momentum = (1 + (1 + 4 * state.momentum**2) ** 0.5) / 2
        uphill = dot(y - point, point - state.point) > 0
        weight = 0.0 if uphill else (state.momentum - 1) / momentum
        ahead = point + weight * (point - state.point)
        ahead = torch.where(free, ahead, ahead.clamp_min(0))
        value, gradient = objective(ahead)
        # Curvature between y and the next point; both gradients are at hand, so no second evaluation is needed.
        change, gone = gradient - state.gradient, ahead - y
        if dot(change, gone) <= lipschitz * dot(gone, gone) * (1 + 1e-9) or norm(gone) == 0:
            return AcceleratedState(
                point,
                value,
                ahead,
                gradient,
                1.0 if uphill else momentum,
                lipschitz * 0.95,
                lipschitz / 2 * dot(move, move),
            )
        lipschitz *= 2.0
    return replace(state, stalled=True)
