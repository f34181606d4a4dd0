r"""The outer loop: which ridge, when to lower it, and when to hold it and move the proximal centre instead.

The gap at a point has two parts that one evaluation measures exactly: what the ridge costs,
$\sum_i r_i'x_i - \min_{v \in C_i} r_i'v$, and the rest, infeasibility and its repair. A stage ends when the rest is
small beside the first; then $\gamma$ falls in proportion to what `tol` allows.

Source: arXiv 2103.05277, the stage-wise choice of gamma. Departure: the paper bounds the cost of the ridge by
$\gamma \psi$ with $\psi = \frac12 (1 - 1/J)$ times the number of blocks that are not at a vertex; here it is measured.
Departure: the proximal outer loop ($c \leftarrow c - \gamma x$) reaches an exact LP optimum with a fixed ridge.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polytope_lp.matching.search import FinishedError, Search, zeros
from polytope_lp.optimizers import accelerated, lbfgs, second_order

TIED, MOSTLY_TIED = 0.5, 0.8
"""Share of blocks away from a vertex above which a problem may be tied, and above which one stage is proof enough."""
TIED_RIDGE = 30.0
"""Factor on the first ridge with which the proximal loop starts on a tied problem."""
SHARE_OF_TOL = 0.5
"""Part of the tolerance that the ridge may use."""
LEAVE = 1.0
"""A stage ends when what optimisation has left is below this multiple of what the ridge costs."""
STEEPEST, MILDEST = 0.1, 0.5
"""Factors by which gamma may fall at once."""
INEXACT = 0.1
"""A proximal step is good enough when its promised improvement is below this part of gamma/2 ||x - p||^2."""
SMALLEST_RIDGE = 1e-9
"""Least gamma relative to the size of the costs: below it projections lose their digits."""
NEWTON_ROWS, NEWTON_VARIABLES = 2000, 300_000
"""Largest problem on which Newton steps take over when the gap has not halved in `PATIENCE` evaluations."""
SMALL_ROWS, SMALL_VARIABLES = 300, 20_000
"""Largest problem that Newton steps solve from the start."""
PATIENCE, SURRENDER = 80, 2000
"""Evaluations without a halved gap after which Newton steps take over, and after which the run counts as stalled."""
NEWTON_RIDGE = 10.0
"""First gamma of Newton steps, in units of `Dual.gamma_start`: a large one makes the dual smooth."""
NEWTON_STEPS = 50
"""Newton steps after which the centre moves in any case."""
LARGEST_RIDGE = 1e4
"""Greatest gamma in the same unit."""
FIRST_RIDGE = 0.3
"""First gamma relative to the size of the costs over that of the variables."""


State = lbfgs.LbfgsState | accelerated.AcceleratedState | second_order.NewtonState


@dataclass
class Stage:
    """Where the outer loop stands: enough to resume it.

    Attributes:
        state: State of the inner optimiser.
        proximal: Whether the proximal loop has begun.
        iterations: Inner iterations in this stage.
        previous: Ridge weight of the stage before.
        share: Share of blocks away from a vertex at the end of the stage before.
        reached: Gap (measured, where there is no upper bound) when it last halved.
        at: Evaluation at which it did.
    """

    state: State
    proximal: bool = False
    iterations: int = 0
    previous: float = math.nan
    share: float = math.inf
    reached: float = math.inf
    at: int = 0


def run(search: Search, stage: Stage | None, save: Callable[[Stage], None]) -> str:
    """Minimise until the search is finished.

    Args:
        search: The run, with the options.
        stage: Where to resume, or None to start at zero.
        save: Called after every inner iteration with the state to resume from.

    Returns:
        The status.
    """
    try:
        if stage is None:
            stage = begin(search, zeros(search.dual))
        while True:
            stage.state = _step(search, stage.state)
            stage.iterations += 1
            if stage.state.stalled or stage.iterations % 2 == 0 or isinstance(stage.state, second_order.NewtonState):
                _advance(search, stage)
            save(stage)
    except FinishedError as finished:
        return str(finished.args[0])


def begin(search: Search, mu: Tensor, gamma: float | None = None) -> Stage:
    """The first stage, with the optimiser that the options or the size of the problem choose.

    Args:
        search: The run.
        mu: Where to start, in scaled multipliers, shape (rows,), float64.
        gamma: First ridge of the first-order methods; the default if None.

    Returns:
        The stage.
    """
    dual, options = search.dual, search.options
    small = mu.shape[0] <= SMALL_ROWS and dual.variables <= SMALL_VARIABLES
    newton = options.method == "newton" or (
        options.method == "auto" and small and options.gamma is None and options.proximal is not False
    )
    default = NEWTON_RIDGE if newton else FIRST_RIDGE
    search.gamma = options.gamma or (default * dual.gamma_start if newton or gamma is None else gamma)
    return Stage(_start(search, mu, newton=newton), proximal=newton)


def _start(search: Search, mu: Tensor, *, newton: bool) -> State:
    if newton:
        return second_order.start(search.objective, mu)
    if search.options.method == "accelerated":
        return accelerated.start(search.objective, mu, 1.0 / search.gamma)
    return lbfgs.start(search.objective, mu)


def _step(search: Search, state: State) -> State:
    dual = search.dual
    if isinstance(state, second_order.NewtonState):

        def hessian(mu: Tensor) -> Tensor:
            return dual.scale[:, None] * dual.curvature(mu * dual.scale, search.gamma, search.anchor) * dual.scale

        size = float((dual.scale * dual.row_unit).norm())
        return second_order.step(search.objective, hessian, state, dual.free, search.gamma, size)
    if isinstance(state, accelerated.AcceleratedState):
        return accelerated.step(search.objective, state, dual.free)
    return lbfgs.step(search.objective, state, dual.free, search.gamma, search.options.memory)


def _advance(search: Search, stage: Stage) -> None:
    # End the stage if it has done its work: lower the ridge, or recentre.
    smoothing, rest = search.measured()
    allowed = SHARE_OF_TOL * search.options.tol
    if smoothing + rest <= 0.5 * stage.reached:
        stage.reached, stage.at = smoothing + rest, len(search.history)
    if len(search.history) - stage.at > SURRENDER:
        raise FinishedError("stalled")
    if _newton_takes_over(search, stage):
        stage.proximal = True
        search.gamma = NEWTON_RIDGE * search.dual.gamma_start
        stage.state = _start(search, stage.state.point, newton=True)
    if stage.proximal:
        moved, newton = search.moved(), isinstance(stage.state, second_order.NewtonState)
        still = moved <= 1e-3 * allowed * search.size and (not newton or rest <= allowed)
        done = stage.state.stalled or stage.state.decrement <= INEXACT * moved or still
        if done or (newton and stage.iterations >= NEWTON_STEPS):
            _recentre(search, stage)
        return
    if not stage.state.stalled and (smoothing <= allowed or rest > LEAVE * smoothing):
        return
    _lower(search, stage, smoothing <= allowed, allowed / max(smoothing, 1e-300))


def _newton_takes_over(search: Search, stage: Stage) -> bool:
    dual, options = search.dual, search.options
    fits = dual.budgets.shape[0] <= NEWTON_ROWS and dual.variables <= NEWTON_VARIABLES
    allowed = options.method == "auto" and options.gamma is None and options.proximal is not False
    late = len(search.history) - stage.at > PATIENCE
    return fits and allowed and late and not isinstance(stage.state, second_order.NewtonState)


def _lower(search: Search, stage: Stage, small: bool, factor: float) -> None:
    # The stage is over: lower the ridge by about `factor`, or begin the proximal loop.
    fixed = search.options.gamma is not None
    share = search.history[-1]["fractional"]
    # Lowering the ridge no longer brings vertices, or the first one found hardly any.
    tied = share > (TIED if math.isfinite(stage.share) else MOSTLY_TIED) and share > 0.7 * min(stage.share, 1.0)
    exhausted = search.gamma <= SMALLEST_RIDGE * search.dual.gamma_start or (stage.state.stalled and small)
    if search.options.proximal or (search.options.proximal is None and (tied or exhausted)):
        if tied and not fixed:
            search.gamma = TIED_RIDGE * (search.gamma if math.isnan(stage.previous) else stage.previous)
        stage.proximal = True
        _recentre(search, stage)
        return
    if fixed or exhausted:
        if stage.state.stalled:
            raise FinishedError("stalled")
        return
    factor = min(max(factor, STEEPEST), MILDEST)
    stage.previous, stage.share = search.gamma, share
    search.gamma = max(search.gamma * factor, SMALLEST_RIDGE * search.dual.gamma_start)
    _restart(search, stage, factor)


def _recentre(search: Search, stage: Stage) -> None:
    # Move the centre, and balance the ridge: infeasibility asks for a larger one, distance from vertices a smaller.
    smoothing, rest = search.measured()
    search.recentre()
    factor = 1.0
    if search.options.gamma is None and isinstance(stage.state, second_order.NewtonState):
        steps = stage.iterations  # many: the dual has too many kinks; few: larger moves pay
        factor = 2.0 if steps > 20 else 1.0 if steps > 10 or rest > smoothing else 0.5 if steps > 5 else 0.2
    elif search.options.gamma is None:
        factor = 3.0 if rest > 2.0 * smoothing else 0.5 if smoothing > 50.0 * rest else 1.0
    start = search.dual.gamma_start
    search.gamma = min(max(search.gamma * factor, SMALLEST_RIDGE * start), LARGEST_RIDGE * start)
    _restart(search, stage, factor)


def _restart(search: Search, stage: Stage, factor: float) -> None:
    """Evaluate the changed objective; the memory stays, since curvature moves only in proportion to 1 / gamma."""
    stage.iterations = 0
    old = stage.state
    fresh = _start(search, old.point, newton=isinstance(old, second_order.NewtonState))
    if isinstance(old, lbfgs.LbfgsState) and isinstance(fresh, lbfgs.LbfgsState):
        fresh = replace(fresh, steps=old.steps, changes=tuple(y / factor for y in old.changes))
    stage.state = fresh


def warm(search: Search, lam: Tensor) -> Stage:
    """Start at the multipliers of an earlier solution, with the ridge that its gap allows.

    Args:
        search: The run.
        lam: Multipliers, shape (rows,), float64.

    Returns:
        The first stage.
    """
    mu = torch.as_tensor(lam, dtype=torch.float64) / search.dual.scale
    mu = torch.where(search.dual.free, mu, mu.clamp_min(0))
    return begin(search, mu, FIRST_RIDGE * STEEPEST * search.dual.gamma_start)
