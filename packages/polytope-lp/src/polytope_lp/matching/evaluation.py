"""The smoothed dual as the optimizers see it: value, gradient and certified bounds at one point."""

import math
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from core_tensor import block_curvature, dual_bounds, dual_pass
from core_tensor.ops.dual_pass import TOTALS
from torch import Tensor

from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.matching.statistics import Statistics, measure
from polytope_lp.optimizers.vectors import dot

KEEP = 1.0 - 1e-12
"""Budgets are met up to this factor, so that no order of summation finds them exceeded."""
UNUSED = 2.0**-500
"""Fixed-point factor of sums that nobody reads."""
FEASIBLE = 1e-9
"""Where shrinking does not repair, rows hold up to this part of their unit, and what that is worth of the objective."""
ROUND = 2.0**-53
"""Relative rounding error of one operation in float64."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    r"""One evaluation of $\min_{x_i \in C_i} c'x + \gamma/2 \lVert x - p \rVert^2 + \lambda'(Ax - b)$.

    Attributes:
        lam: Multipliers, shape (rows,), float64.
        gamma: Weight of the ridge.
        value: $g_\gamma(\lambda)$.
        gradient: $A x - b$, shape (rows,), float64.
        lower: $g_0(\lambda)$ with the original costs: a lower bound of the LP's optimum.
        upper: Cost of the repaired primal, an upper bound; where shrinking does not repair, that of the primal itself
            if it is feasible up to `FEASIBLE`, else infinite.
        cost: $c'x$ of the primal as projected.
        shrink: Factors per row that repair the primal, shape (rows,), float64, or None.
        violation: Greatest violation of a row over its unit (`Statistics.row_unit`), before repair.
        fractional: Blocks away from a vertex of their polytope.
        nonzero: Variables above zero.
        rounding: What `lower` leaves for the rounding of float64.
    """

    lam: Tensor
    gamma: float
    value: float
    gradient: Tensor
    lower: float
    upper: float
    cost: float
    shrink: Tensor | None
    violation: float
    fractional: int
    nonzero: int
    rounding: float

    @property
    def smoothing(self) -> float:
        r"""What the ridge costs: $\sum_i r_i'x_i - \min_{v \in C_i} r_i'v \ge 0$, zero when every x_i is LP-optimal."""
        return self.cost + dot(self.lam, self.gradient) - (self.lower + self.rounding)


class Dual(Protocol):
    """What an optimizer needs of a problem.

    Attributes:
        scale: Power of two by row, so that rows of `scale * A` have norms near one, shape (rows,), float64.
        free: Rows whose multiplier has no sign (equations), shape (rows,), bool.
        budgets: Right-hand sides b, shape (rows,), float64.
        blocks: Number of blocks of the whole problem.
        variables: Number of variables of the whole problem.
        own_variables: Number of variables of this rank's blocks.
        ceiling: Greatest value that c'x takes on the blocks: a lower bound above it proves infeasibility.
        unit: What gaps are relative to where the bounds are smaller: the most that one edge can add to the objective.
        row_unit: What violations of each row are relative to, shape (rows,), float64.
        gamma_start: Ridge weight at which smoothing is comparable to the costs themselves.
    """

    scale: Tensor
    free: Tensor
    budgets: Tensor
    blocks: int
    variables: int
    own_variables: int
    ceiling: float
    unit: float
    row_unit: Tensor
    gamma_start: float

    def evaluate(self, lam: Tensor, gamma: float, anchor: Tensor | None = None) -> Evaluation:
        """Evaluate at one point.

        Args:
            lam: Multipliers, shape (rows,), float64.
            gamma: Weight of the ridge.
            anchor: Proximal center, or None for the origin.
        """
        ...

    def primal(self, lam: Tensor, gamma: float, anchor: Tensor | None = None) -> Tensor:
        """The projected primal (of this rank's blocks), before repair.

        Args:
            lam: Multipliers, shape (rows,), float64.
            gamma: Weight of the ridge.
            anchor: Proximal center, or None for the origin.
        """
        ...

    def curvature(self, lam: Tensor, gamma: float, anchor: Tensor | None = None) -> Tensor:
        r"""Generalized Hessian of the negative dual, $A P A' / \gamma$ with P the derivative of the projections.

        Args:
            lam: Multipliers, shape (rows,), float64.
            gamma: Weight of the ridge.
            anchor: Proximal center, or None for the origin.
        """
        ...

    def elapsed(self) -> float:
        """Seconds since the start, the same on every rank."""
        ...


class FusedDual:
    """`Dual` of a `MatchingProblem` by the native fused pass; with a process group, of the shards of all ranks.

    Args:
        problem: The problem, or this rank's shard of it.
        group: Process group over which sums are taken, or None.
        statistics: What `measure` finds in the problem; measured here if None.
    """

    def __init__(self, problem: MatchingProblem, group: Any = None, statistics: Statistics | None = None) -> None:
        self._start = time.monotonic()
        self._mean_elapsed = 0.0
        found = measure(problem, group) if statistics is None else statistics
        self.problem, self.group, self.statistics = problem, group, found
        self.budgets, self.free = problem.budgets, problem.equality
        self.repairable, self.blocks, self.variables = found.repairable, found.blocks, found.variables
        self.own_variables = problem.data.variables
        self.unit, self.row_unit = found.unit, found.row_unit
        square = torch.where(found.square > 0, found.square, 1.0)
        self.scale = torch.exp2(-torch.round(torch.log2(square) / 2))
        self.ceiling = math.inf if found.repairable else found.tight_cost * (1 + 1e-9)
        some = found.cost_sum > 0 and found.amount_sum > 0
        self.gamma_start = found.cost_sum / found.amount_sum if some else 1.0
        # Fixed-point factors: bounds of every sum are known, but that of the least values needs the multipliers.
        rows = torch.stack([found.load, found.spent], 1).ravel()
        totals = [found.cost, 2.0 * found.amount_square, found.cost, float(self.variables), float(self.variables)]
        self._scale_now = _fixed_point(torch.cat([rows, torch.tensor(totals, dtype=torch.float64)]))
        self._exponent = math.frexp(found.cost)[1]
        # Loads are whole multiples of their resolution: repair stays as far below the budget, where that matters.
        margin = 2.0 * problem.bounds.shape[0] / self._scale_now[: 2 * problem.rows : 2]
        self._margin: Tensor | None = torch.minimum(margin, self.budgets.abs())
        self._empty = torch.nonzero(self.budgets <= self._margin).ravel() if self.repairable else torch.zeros(0).long()
        if bool((self._margin <= 0.1 * (1.0 - KEEP) * self.budgets.abs()).all()):
            self._margin = None
        self._equations = self.free if bool(self.free.any()) else None
        single = problem.data.index.ndim == 1 or problem.data.index.shape[1] == 1
        # `dual_bounds` shrinks all that a row spends; edges that take nothing from it keep their amounts.
        self._one_pass_repairs = single and not found.free_edges
        lengths = problem.data.offsets[1:] - problem.data.offsets[:-1]
        longest = int(lengths.max()) if lengths.numel() else 0
        self._terms = longest + self.variables // max(1, problem.bounds.shape[0] - 1) + problem.rows + 8
        self._filled = _filled(problem, group) if problem.data.equality else None

    def _scale(self, lam: Tensor) -> Tensor:
        # Bounds of every sum are known before it is taken; only that of the least values depends on the multipliers.
        exponent = math.frexp(self._magnitude(lam))[1]
        if exponent != self._exponent:
            self._exponent, self._scale_now = exponent, self._scale_now.clone()
            self._scale_now[2 * lam.shape[0] + TOTALS.index("least")] = 2.0 ** min(60 - exponent, 900)
        return self._scale_now

    def _magnitude(self, lam: Tensor) -> float:
        # Bound of the sum of |r_e| t_e at these multipliers.
        return self.statistics.cost + dot(lam.abs(), self.statistics.load)

    def _rounding(self, lam: Tensor, least: float) -> float:
        # Most by which float64 can have got the lower bound wrong: in the reduced costs, and in the sums.
        products, budget = self._magnitude(lam), dot(lam.abs(), self.budgets.abs())
        summed = (abs(least) if not self.problem.data.equality else products) + budget
        per_variable = self.problem.data.index.reshape(self.problem.data.variables, -1).shape[1] + 3
        if self._filled is not None:
            # What rounding leaves of a source's cap goes to some edge, at whatever it costs.
            total, steepest = self._filled
            summed += total * float((lam.abs() * steepest).max()) if lam.numel() else 0.0
        return ROUND * (per_variable * products + self._terms * summed)

    def _sums(self, lam: Tensor, gamma: float, anchor: Tensor | None, shrink: Tensor | None) -> tuple[Tensor, Tensor]:
        scale = self._scale(lam)
        sums, _ = dual_pass(
            self.problem.data, lam, gamma, scale, self.problem.bounds, anchor=anchor, shrink=shrink, check=False
        )
        if self.group is not None:
            clock = torch.tensor([int(1e6 * (time.monotonic() - self._start))])
            packed = torch.cat([sums, clock])
            torch.distributed.all_reduce(packed, group=self.group)  # the one collective of an evaluation
            sums = packed[:-1]
            self._mean_elapsed = float(packed[-1]) / 1e6 / torch.distributed.get_world_size(self.group)
        return sums, scale

    def evaluate(self, lam: Tensor, gamma: float, anchor: Tensor | None = None) -> Evaluation:
        """See `Dual.evaluate`.

        Args:
            lam: Multipliers, shape (rows,), float64.
            gamma: Weight of the ridge.
            anchor: Proximal center, shape (variables,), or None for the origin.

        Returns:
            Value, gradient and bounds.
        """
        sums, scale = self._sums(lam, gamma, anchor, None)
        reduced = self.budgets if self._margin is None else self.budgets - self._margin
        gradient, shrink, found = dual_bounds(sums, scale, lam, reduced, free=self._equations, keep=KEEP)
        if self._margin is not None:
            priced = dot(lam, self._margin)
            gradient, found["priced"] = gradient - self._margin, found["priced"] - priced
            found["budget"] += priced
        if self._empty.numel():  # their loads may be too small to show in the sums: nothing is left in them
            spent = sums[2 * self._empty + 1] / scale[2 * self._empty + 1]
            found["repaired"] -= float(spent @ shrink[self._empty])
            shrink = shrink.index_fill(0, self._empty, 0.0)
        rounding = self._rounding(lam, found["least"])
        lower = found["least"] - found["budget"] - rounding
        excess = gradient if self._equations is None else torch.where(self.free, gradient.abs(), gradient)
        excess = excess.clamp_min(0)
        violation = float((excess / self.row_unit).max()) if excess.numel() else 0.0
        upper = math.inf
        if self.repairable:
            upper = found["repaired"] if self._one_pass_repairs else self._repaired_cost(lam, gamma, anchor, shrink)
        elif violation <= FEASIBLE and dot(lam.abs(), excess) <= 0.5 * FEASIBLE * max(abs(lower), self.unit):
            upper = found["cost"]
        return Evaluation(
            lam=lam,
            gamma=gamma,
            value=found["cost"] + gamma / 2 * found["square"] + found["priced"],
            gradient=gradient,
            lower=lower,
            upper=upper,
            cost=found["cost"],
            shrink=shrink if self.repairable else None,
            violation=violation,
            fractional=round(found["fractional"]),
            nonzero=round(found["nonzero"]),
            rounding=rounding,
        )

    def _repaired_cost(self, lam: Tensor, gamma: float, anchor: Tensor | None, shrink: Tensor) -> float:
        # A variable with several rows is shrunk by the least of their factors, which takes another pass.
        sums, scale = self._sums(lam, gamma, anchor, shrink)
        cost = 2 * lam.shape[0] + TOTALS.index("cost")
        return float(sums[cost] / scale[cost])

    def primal(self, lam: Tensor, gamma: float, anchor: Tensor | None = None) -> Tensor:
        """See `Dual.primal`.

        Args:
            lam: Multipliers, shape (rows,), float64.
            gamma: Weight of the ridge.
            anchor: Proximal center, shape (variables,), or None for the origin.

        Returns:
            The primal in the dtype of the costs, shape (variables,).
        """
        problem, data = self.problem, self.problem.data
        x = torch.empty(data.variables, dtype=data.cost.dtype)
        for begin, end in problem.pieces():
            at = slice(int(data.offsets[begin] - data.offsets[0]), int(data.offsets[end] - data.offsets[0]))
            x[at] = primal_piece(problem, begin, end, lam, gamma, None if anchor is None else anchor[at], None)
        return x

    def curvature(self, lam: Tensor, gamma: float, anchor: Tensor | None = None) -> Tensor:
        """See `Dual.curvature`.

        Args:
            lam: Multipliers, shape (rows,), float64.
            gamma: Weight of the ridge.
            anchor: Proximal center, shape (variables,), or None for the origin.

        Returns:
            Shape (rows, rows), float64.
        """
        problem, rows, origin = self.problem, self.budgets.shape[0], self.problem.data.offsets[0]
        factor = 2.0 ** math.floor(60.0 - math.log2(max(float(self.statistics.square.max()), 1e-300)))
        total = torch.zeros(rows, rows, dtype=torch.int64)
        for begin, end in problem.pieces():
            at = slice(int(problem.data.offsets[begin] - origin), int(problem.data.offsets[end] - origin))
            x = primal_piece(problem, begin, end, lam, gamma, None if anchor is None else anchor[at], None)
            total += block_curvature(problem.slice(begin, end), x, rows, factor, check=False)
        if self.group is not None:
            torch.distributed.all_reduce(total, group=self.group)
        return total.double() / (factor * gamma)

    def elapsed(self) -> float:
        """See `Dual.elapsed`.

        Returns:
            Seconds.
        """
        return self._mean_elapsed if self.group is not None else time.monotonic() - self._start


def _filled(problem: MatchingProblem, group: Any) -> tuple[float, Tensor]:
    # Sum of the caps, and the most that a unit of weight takes from each row.
    total = problem.data.cap.double().expand(problem.data.blocks).sum()
    steepest = torch.zeros(problem.rows, dtype=torch.float64)
    for begin, end in problem.pieces():
        part = problem.slice(begin, end)
        rows = part.index.reshape(part.variables, -1).long()
        a = torch.ones(rows.shape, dtype=torch.float64) if part.coefficient is None else part.coefficient.double()
        per_weight = a.reshape(rows.shape).abs() / (1.0 if part.weight is None else part.weight.double()[:, None])
        steepest.scatter_reduce_(0, rows.ravel(), per_weight.ravel(), "amax")
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
        torch.distributed.all_reduce(steepest, op=torch.distributed.ReduceOp.MAX, group=group)
    return float(total), steepest


def _fixed_point(bounds: Tensor) -> Tensor:
    # Powers of two that keep sums within their bounds below 2**60.
    return torch.exp2((60 - torch.frexp(bounds).exponent).clamp(max=900).double())


def primal_piece(
    problem: MatchingProblem,
    begin: int,
    end: int,
    lam: Tensor,
    gamma: float,
    anchor: Tensor | None,
    shrink: Tensor | None,
) -> Tensor:
    """The primal of a run of blocks.

    Args:
        problem: The problem.
        begin: First block.
        end: Block after the last.
        lam: Multipliers, shape (rows,), float64.
        gamma: Weight of the ridge.
        anchor: Proximal center of the run, shape (variables of the run,), or None.
        shrink: Repair factors per row, shape (rows,), or None.

    Returns:
        The primal, shape (variables of the run,), float64.
    """
    part = problem.slice(begin, end)
    scale = torch.full((2 * lam.shape[0] + len(TOTALS),), UNUSED, dtype=torch.float64)
    bounds = torch.tensor([0, part.blocks])
    _, x = dual_pass(part, lam, gamma, scale, bounds, anchor=anchor, shrink=shrink, primal=True, check=False)
    return x
