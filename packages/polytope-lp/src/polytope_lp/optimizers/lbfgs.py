r"""Limited-memory BFGS for a smooth convex function over $\mu \ge 0$ (some coordinates free), by two-metric projection.

Coordinates at zero whose gradient pushes them down are held; the quasi-Newton direction is formed on
the others, with the pairs (s, y) restricted to them. All state is explicit, so a run can be stopped, written to disk
and taken up again without changing a bit of its course.

Source: arXiv 2103.05277 names L-BFGS-B. Departure: two-metric projection (Bertsekas, 1982) in place of the generalized
Cauchy point; `tests/test_lbfgs.py` compares both on the same duals.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from polytope_lp.optimizers.vectors import dot, norm

Objective = Callable[[Tensor], tuple[float, Tensor]]


@dataclass(frozen=True)
class LbfgsState:
    """State of a run.

    Attributes:
        point: Current point, shape (n,), float64.
        value: Objective there.
        gradient: Gradient there, shape (n,), float64.
        steps: Past steps s, newest last.
        changes: Past changes y of the gradient, newest last.
        decrement: Decrease that the last model promised, an estimate of the distance to the optimum in value.
        stalled: Whether the last step could not decrease the objective.
    """

    point: Tensor
    value: float
    gradient: Tensor
    steps: tuple[Tensor, ...] = ()
    changes: tuple[Tensor, ...] = ()
    decrement: float = field(default=float("inf"))
    stalled: bool = False


def start(objective: Objective, point: Tensor) -> LbfgsState:
    """Evaluate a starting point.

    Args:
        objective: Value and gradient of a point.
        point: Where to start, shape (n,), float64.

    Returns:
        A state without memory.
    """
    value, gradient = objective(point)
    return LbfgsState(point, value, gradient)


def step(objective: Objective, state: LbfgsState, free: Tensor, first: float, memory: int = 20) -> LbfgsState:
    """One iteration: direction, projected line search, memory.

    Args:
        objective: Value and gradient of a point.
        state: State of the run.
        free: Coordinates without a sign, shape (n,), bool.
        first: Length by which the gradient is multiplied while there is no memory.
        memory: Pairs to keep.

    Returns:
        The next state; `stalled` with the same point when no decrease was found.
    """
    held = ~free & (state.point <= 0) & (state.gradient >= 0)
    direction = -_inverse_hessian(state, ~held, first)
    slope = dot(direction, state.gradient)
    found = _line_search(objective, state, direction, free) if slope < 0 else None
    if found is None:
        if not state.steps:
            return replace(state, stalled=True)
        return step(objective, replace(state, steps=(), changes=()), free, first, memory)
    point, value, gradient = found
    s, y = point - state.point, gradient - state.gradient
    steps, changes = state.steps, state.changes
    if dot(s, y) > 1e-14 * norm(s) * norm(y):
        steps, changes = (*steps, s)[-memory:], (*changes, y)[-memory:]
    return LbfgsState(point, value, gradient, steps, changes, -slope / 2, False)


def _inverse_hessian(state: LbfgsState, moving: Tensor, first: float) -> Tensor:
    """Two-loop recursion on the moving coordinates; `first` times the gradient while there is no usable pair."""
    # numpy: on a thousand coordinates a call of torch takes longer than its arithmetic.
    at = np.flatnonzero(moving.numpy())
    q = state.gradient.numpy()[at]
    S, Y = (np.array([v.numpy()[at] for v in vectors]) for vectors in (state.steps, state.changes))  # (pairs, moving)
    if state.steps:
        curvature, lengths, squares = (np.add.reduce(product, 1) for product in (S * Y, S * S, Y * Y))
        usable = np.flatnonzero((curvature > 1e-12 * np.sqrt(lengths * squares)) & (curvature > 0)).tolist()
    else:
        usable = []
    if usable:
        weights = []
        for k in reversed(usable):
            weights.append(np.add.reduce(S[k] * q) / curvature[k])
            q -= weights[-1] * Y[k]
        q *= curvature[usable[-1]] / squares[usable[-1]]
        for k in usable:
            q += (weights.pop() - np.add.reduce(Y[k] * q) / curvature[k]) * S[k]
    else:
        q *= first
    direction = torch.zeros_like(state.gradient)
    direction.numpy()[at] = q
    return direction


def _line_search(
    objective: Objective, state: LbfgsState, direction: Tensor, free: Tensor, trials: int = 25
) -> tuple[Tensor, float, Tensor] | None:
    # Weak Wolfe point along the projected ray: longer while the slope stays steep, interpolation when too far.
    # Near the optimum values differ by less than their rounding; there a step counts as a decrease when the slope at
    # its end shows one (the approximate condition of Hager and Zhang).
    low, high, t = 0.0, float("inf"), 1.0
    noise = 1e-15 * abs(state.value)
    best: tuple[Tensor, float, Tensor] | None = None
    for _ in range(trials):
        point = torch.where(free, state.point + t * direction, (state.point + t * direction).clamp_min(0))
        move = point - state.point
        expected = dot(move, state.gradient)
        if expected >= 0:
            return best
        value, gradient = objective(point)
        slope = dot(move, gradient)  # of the path's chord, times t
        decreased = value <= state.value + 1e-4 * expected
        decreased |= value <= state.value + noise and slope <= -0.8 * expected
        if not decreased:
            high = t
            # Least value of the parabola through the start's value and slope and the trial's value.
            curve = value - state.value - expected
            t = t * min(max(-expected / (2 * curve), 0.1), 0.6) if curve > 0 else t / 2
            if low > 0:
                t = min(max(t, low + 0.1 * (high - low)), high - 0.1 * (high - low))
            continue
        best = (point, value, gradient)
        if slope >= 0.9 * expected or high < float("inf"):
            return best
        low, t = t, t * 4.0
    return best
