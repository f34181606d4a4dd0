r"""Semismooth Newton on the smoothed dual over $\mu \ge 0$ (some coordinates free), for problems with few rows.

The dual is piecewise quadratic; its generalized Hessian is $-A P A' / \gamma$ with P the derivative of the projections.
Coordinates held at zero are left out (two-metric projection, as in `lbfgs`), the rest solve
$(A P A'/\gamma + \delta I) d = -\nabla$ with a damping $\delta$ that vanishes with the gradient, then backtrack.

Source: Li, Sun, Toh, "On the efficient computation of a projector over the Birkhoff polytope" and its sequels, for the
use of P; the paper behind this package stays with first-order methods. Under the proximal loop few steps per center are
enough, and the loop ends after finitely many centers because the problem is an LP.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from polytope_lp.optimizers.lbfgs import Objective
from polytope_lp.optimizers.vectors import dot, norm

FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-2, 1e-4, 1e6
"""Damping, in units of `NewtonState.damping`: lowered after whole steps, raised where none goes down."""


@dataclass(frozen=True)
class NewtonState:
    """State of a run.

    Attributes:
        point: Current point, shape (n,), float64.
        value: Objective there.
        gradient: Gradient there, shape (n,), float64.
        damping: Levenberg's damping over the largest possible curvature 1 / gamma and the relative gradient.
        decrement: Decrease that the last model promised for a whole step, an estimate of the distance in value.
        stalled: Whether the last step could not decrease the objective.
    """

    point: Tensor
    value: float
    gradient: Tensor
    damping: float = FIRST_DAMPING
    decrement: float = float("inf")
    stalled: bool = False


def start(objective: Objective, point: Tensor) -> NewtonState:
    """Evaluate a starting point.

    Args:
        objective: Value and gradient of a point.
        point: Where to start, shape (n,), float64.

    Returns:
        The first state.
    """
    value, gradient = objective(point)
    return NewtonState(point, value, gradient)


def step(
    objective: Objective,
    hessian: Callable[[Tensor], Tensor],
    state: NewtonState,
    free: Tensor,
    gamma: float,
    size: float,
) -> NewtonState:
    """One damped Newton step.

    Args:
        objective: Value and gradient of a point.
        hessian: Generalized Hessian at a point, shape (n, n), float64.
        state: State of the run.
        free: Coordinates without a sign, shape (n,), bool.
        gamma: Weight of the ridge: 1 / gamma bounds the curvature of scaled rows.
        size: What gradients are relative to: the norm of the right-hand sides in the same scale.

    Returns:
        The next state; `stalled` with the same point when no decrease was found.
    """
    held = ~free & (state.point <= 0) & (state.gradient >= 0)
    moving = torch.nonzero(~held).ravel()
    rest = state.gradient[moving]
    if not moving.numel() or norm(rest) <= 1e-15 * size:
        return replace(state, stalled=True)
    H = hessian(state.point)[moving][:, moving].numpy()
    relative = min(norm(rest) / size, 1.0)
    damping = state.damping
    while damping <= MOST_DAMPING:
        damped = H.copy()
        damped.flat[:: H.shape[0] + 1] += damping * relative / gamma + 1e-13 / gamma
        try:
            factor = scipy.linalg.cho_factor(damped, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:  # not positive definite in float64: only more damping helps
            damping *= 100.0
            continue
        solved = scipy.linalg.cho_solve(factor, -rest.numpy(), check_finite=False)
        direction = torch.zeros_like(state.point)
        direction[moving] = torch.from_numpy(solved)
        found = _backtrack(objective, state, direction, free)
        if found is not None:
            t, point, value, gradient = found
            change = 0.1 if t == 1.0 else 1.0 if t > 0.1 else 10.0
            decrement = -dot(direction, state.gradient) / 2
            return NewtonState(point, value, gradient, max(damping * change, LEAST_DAMPING), decrement)
        damping *= 100.0
    return replace(state, stalled=True)


def _backtrack(
    objective: Objective, state: NewtonState, direction: Tensor, free: Tensor, trials: int = 8
) -> tuple[float, Tensor, float, Tensor] | None:
    # Armijo along the projected ray; below the rounding of values the slope decides, as in `lbfgs`.
    t, noise = 1.0, 1e-15 * abs(state.value)
    for _ in range(trials):
        point = state.point + t * direction
        point = torch.where(free, point, point.clamp_min(0))
        move = point - state.point
        expected = dot(move, state.gradient)
        if expected >= 0:
            return None
        value, gradient = objective(point)
        enough = value <= state.value + 1e-4 * expected
        if enough or (value <= state.value + noise and dot(move, gradient) <= -0.8 * expected):
            return t, point, value, gradient
        curve = value - state.value - expected
        t *= min(max(-expected / (2 * curve), 0.1), 0.5) if curve > 0 else 0.5
    return None
