r"""The outer loop: which ridge, when to lower it, and when to hold it and move the proximal center instead.

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

from polytope_lp.matching import exact
from polytope_lp.matching.evaluation import FusedDual
from polytope_lp.matching.search import FinishedError, Search, zeros
from polytope_lp.matching.statistics import packing_rows
from polytope_lp.optimizers import accelerated, lbfgs, second_order
from polytope_lp.optimizers.vectors import dot, norm


@dataclass(frozen=True)
class Tuning:
    r"""What the outer loop is tuned by. Ridges are in units of `Dual.gamma_start`, the size of costs over amounts.

    Attributes:
        first_ridge: First ridge: below 1, so that most sources have chosen already.
        smallest_ridge: Least ridge: below it projections lose their digits, 1e-16 of the reduced costs.
        largest_ridge: Greatest ridge: beyond it the proximal loop moves by nothing.
        share_of_tol: Part of the tolerance that the ridge may use; the other half is left to infeasibility.
        leave: A stage ends when what optimization has left is below this multiple of what the ridge costs: going on
            would polish what the next ridge changes.
        steepest: Least factor by which a ridge falls at once: L-BFGS's memory is of use for one tenth, not less.
        mildest: Greatest such factor: a stage that gains less costs more than it brings.
        tied: Share of blocks off a vertex above which a problem may be tied, if lowering the ridge does not bring more.
        mostly_tied: Share above which one stage is proof enough.
        tied_ridge: Factor on the first ridge with which the proximal loop starts on a tied problem: ties ask for long
            steps of the center, not for vertices.
        inexact: A proximal step is good enough when its promised improvement is below this part of
            $\gamma/2 \lVert x - p \rVert^2$: exact centers cost evaluations that the next one throws away.
        small_rows: Rows up to which Newton steps solve from the start: a dense system costs less than an evaluation.
        small_variables: Variables up to which they do.
        newton_rows: Rows up to which Newton steps take over when the gap does not halve: memory of the dense Hessian.
        newton_variables: Variables up to which they do: each Hessian is a pass over all of them.
        newton_ridge: First ridge of Newton steps: a large one makes the dual smooth, and the center does the rest.
        newton_steps: Newton steps after which the center moves in any case.
        patience: Evaluations without a halved gap after which Newton steps take over.
        surrender: Evaluations without a halved gap after which the run counts as stalled.
        hand_over: The same where the problem is small: then HiGHS takes less time than further evaluations.
        highs_variables: Variables up to which HiGHS is asked where a run has stalled.
        inside: Part of the tolerance that aiming inside the budgets may cost, where shrinking does not repair.
        polish: Evaluations that may be spent on a feasible point once residuals are within tol.
        hold: Iterations for which the center stays where it is until a point is feasible.
        polish_ridge: Factor by which the ridge rises then: the dual becomes smooth, and the center is near already.
        exact_variables: Variables up to which Newton steps are taken then if there are equations, which L-BFGS would
            meet up to a few digits only.
    """

    first_ridge: float = 0.3
    smallest_ridge: float = 1e-9
    largest_ridge: float = 1e4
    share_of_tol: float = 0.5
    leave: float = 1.0
    steepest: float = 0.1
    mildest: float = 0.5
    tied: float = 0.5
    mostly_tied: float = 0.8
    tied_ridge: float = 30.0
    inexact: float = 0.1
    small_rows: int = 300
    small_variables: int = 20_000
    newton_rows: int = 2000
    newton_variables: int = 300_000
    newton_ridge: float = 10.0
    newton_steps: int = 50
    patience: int = 80
    surrender: int = 2000
    hand_over: int = 400
    highs_variables: int = 100_000
    inside: float = 0.25
    polish: int = 400
    hold: int = 200
    polish_ridge: float = 100.0
    exact_variables: int = 5_000_000


TUNING = Tuning()

State = lbfgs.LbfgsState | accelerated.AcceleratedState | second_order.NewtonState


@dataclass
class Stage:
    """State of the outer loop: enough to resume it.

    Attributes:
        state: State of the inner optimizer.
        proximal: Whether the proximal loop has begun.
        iterations: Inner iterations in this stage.
        previous: Ridge weight of the stage before.
        share: Share of blocks away from a vertex at the end of the stage before.
        reached: Gap (measured, where there is no upper bound) when it last halved.
        at: Evaluation at which it did.
        aimed: Evaluation at which rows were first aimed inside their budgets; 0 before.
    """

    state: State
    proximal: bool = False
    iterations: int = 0
    previous: float = math.nan
    share: float = math.inf
    reached: float = math.inf
    at: int = 0
    aimed: int = 0


def run(search: Search, stage: Stage | None, save: Callable[[Stage], None]) -> str:
    """Minimize until the search is finished.

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
        status = str(finished.args[0])
    if status == "stalled" and _fits_highs(search):
        try:
            exact.finish(search)
        except FinishedError as finished:
            status = str(finished.args[0])
    return search.settled(status)


def _fits_highs(search: Search) -> bool:
    options = search.options
    plain = options.method == "auto" and options.gamma is None and options.proximal is not False
    return plain and search.dual.variables <= TUNING.highs_variables


def begin(search: Search, mu: Tensor, gamma: float | None = None) -> Stage:
    """The first stage, with the optimizer that the options or the size of the problem choose.

    Args:
        search: The run.
        mu: Where to start, in scaled multipliers, shape (rows,), float64.
        gamma: First ridge of the first-order methods; the default if None.

    Returns:
        The stage.
    """
    dual, options = search.dual, search.options
    small = mu.shape[0] <= TUNING.small_rows and dual.variables <= TUNING.small_variables
    newton = options.method == "newton" or (
        options.method == "auto" and small and options.gamma is None and options.proximal is not False
    )
    default = TUNING.newton_ridge if newton else TUNING.first_ridge
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

        size = norm(dual.scale * dual.row_unit)
        return second_order.step(search.objective, hessian, state, dual.free, search.gamma, size)
    if isinstance(state, accelerated.AcceleratedState):
        return accelerated.step(search.objective, state, dual.free)
    return lbfgs.step(search.objective, state, dual.free, search.gamma, search.options.memory)


def _advance(search: Search, stage: Stage) -> None:
    # End the stage if it has done its work: lower the ridge, or recenter.
    smoothing, rest = search.measured()
    allowed = TUNING.share_of_tol * search.options.tol
    if search.residual is not None and search.margin is None:
        _aim_inside(search, stage)
        return
    if stage.aimed and len(search.history) - stage.aimed > TUNING.polish:
        raise FinishedError("stalled")
    if smoothing + rest <= 0.5 * stage.reached:
        stage.reached, stage.at = smoothing + rest, len(search.history)
    small = search.dual.variables <= TUNING.small_variables and _fits_highs(search)
    if len(search.history) - stage.at > (TUNING.hand_over if small else TUNING.surrender):
        raise FinishedError("stalled")
    if _newton_takes_over(search, stage):
        stage.proximal = True
        search.gamma = TUNING.newton_ridge * search.dual.gamma_start
        stage.state = _start(search, stage.state.point, newton=True)
    if stage.aimed and math.isinf(search.upper) and not stage.state.stalled and stage.iterations < TUNING.hold:
        return
    if stage.proximal:
        moved, newton = search.moved(), isinstance(stage.state, second_order.NewtonState)
        still = moved <= 1e-3 * allowed * search.size and (not newton or rest <= allowed)
        done = stage.state.stalled or stage.state.decrement <= TUNING.inexact * moved or still
        if done or (newton and stage.iterations >= TUNING.newton_steps):
            _recenter(search, stage)
        return
    if not stage.state.stalled and (smoothing <= allowed or rest > TUNING.leave * smoothing):
        return
    _lower(search, stage, smoothing <= allowed, allowed / max(smoothing, 1e-300))


def _aim_inside(search: Search, stage: Stage) -> None:
    """Lower the budgets of inequalities by a little, so that a point close to the optimum for those is feasible."""
    dual, options = search.dual, search.options
    units = dual.budgets.abs()
    if bool((units == 0).any()) and isinstance(dual, FusedDual):  # nothing is inside a packing row without budget
        inside = torch.where(packing_rows(dual.problem, dual.group), 0.0, dual.row_unit)
        units = torch.where(units > 0, units, inside)
    units = torch.where(dual.free, 0.0, units)
    assert search.price is not None
    worth = dot(search.price.abs(), units) / search.size
    search.margin = TUNING.inside * options.tol / max(worth, 1.0) * units
    stage.reached, stage.at, stage.aimed = math.inf, len(search.history), len(search.history)
    # A nearby center and a large ridge make the dual smooth, and the cost of the way to feasibility small.
    search.recenter()
    search.gamma *= TUNING.polish_ridge
    stage.proximal = True
    most = TUNING.exact_variables if bool(dual.free.any()) else TUNING.newton_variables
    if isinstance(stage.state, second_order.NewtonState) or _newton_fits(search, most):
        stage.iterations = 0
        stage.state = _start(search, stage.state.point, newton=True)
    else:
        _restart(search, stage, TUNING.polish_ridge)


def _newton_fits(search: Search, variables: int = TUNING.newton_variables) -> bool:
    dual, options = search.dual, search.options
    fits = dual.budgets.shape[0] <= TUNING.newton_rows and dual.variables <= variables
    return fits and options.method == "auto" and options.gamma is None and options.proximal is not False


def _newton_takes_over(search: Search, stage: Stage) -> bool:
    late = len(search.history) - stage.at > TUNING.patience
    return late and _newton_fits(search) and not isinstance(stage.state, second_order.NewtonState)


def _lower(search: Search, stage: Stage, small: bool, factor: float) -> None:
    # The stage is over: lower the ridge by about `factor`, or begin the proximal loop.
    fixed = search.options.gamma is not None
    share = search.history[-1]["fractional"]
    # Lowering the ridge no longer brings vertices, or the first one found hardly any.
    tied = share > (TUNING.tied if math.isfinite(stage.share) else TUNING.mostly_tied) and share > 0.7 * min(
        stage.share, 1.0
    )
    exhausted = search.gamma <= TUNING.smallest_ridge * search.dual.gamma_start or (stage.state.stalled and small)
    if search.options.proximal or (search.options.proximal is None and (tied or exhausted)):
        if tied and not fixed:
            search.gamma = TUNING.tied_ridge * (search.gamma if math.isnan(stage.previous) else stage.previous)
        stage.proximal = True
        _recenter(search, stage)
        return
    if fixed or exhausted:
        if stage.state.stalled:
            raise FinishedError("stalled")
        return
    factor = min(max(factor, TUNING.steepest), TUNING.mildest)
    stage.previous, stage.share = search.gamma, share
    search.gamma = max(search.gamma * factor, TUNING.smallest_ridge * search.dual.gamma_start)
    _restart(search, stage, factor)


def _recenter(search: Search, stage: Stage) -> None:
    # Move the center, and balance the ridge: infeasibility asks for a larger one, distance from vertices a smaller.
    smoothing, rest = search.measured()
    search.recenter()
    factor = 1.0
    if search.options.gamma is None and isinstance(stage.state, second_order.NewtonState):
        steps = stage.iterations  # many: the dual has too many kinks; few: larger moves pay
        factor = 2.0 if steps > 20 else 1.0 if steps > 10 or rest > smoothing else 0.5 if steps > 5 else 0.2
    elif search.options.gamma is None:
        factor = 3.0 if rest > 2.0 * smoothing else 0.5 if smoothing > 50.0 * rest else 1.0
    start = search.dual.gamma_start
    search.gamma = min(max(search.gamma * factor, TUNING.smallest_ridge * start), TUNING.largest_ridge * start)
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
    return begin(search, mu, TUNING.first_ridge * TUNING.steepest * search.dual.gamma_start)
