"""The smoothed dual as the optimisers see it: value, gradient and certified bounds at one point."""

import math
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from core_tensor import block_curvature, dual_bounds, dual_pass
from core_tensor.ops.dual_pass import TOTALS
from torch import Tensor

from polytope_lp.matching.problem import MatchingProblem

KEEP = 1.0 - 1e-12
"""Budgets are met up to this factor, so that no order of summation finds them exceeded."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    r"""One evaluation of $\min_{x_i \in C_i} c'x + \gamma/2 \lVert x - p \rVert^2 + \lambda'(Ax - b)$.

    Attributes:
        lam: Multipliers, shape (rows,), float64.
        gamma: Weight of the ridge.
        value: $g_\gamma(\lambda)$.
        gradient: $A x - b$, shape (rows,), float64.
        lower: $g_0(\lambda)$ with the original costs: a lower bound of the LP's optimum.
        upper: Cost of the repaired primal, an upper bound; infinite where shrinking does not repair.
        cost: $c'x$ of the primal as projected.
        shrink: Factors per row that repair the primal, shape (rows,), float64, or None.
        violation: Greatest violation of a row over $1 + |b|$, before repair.
        fractional: Blocks away from a vertex of their polytope.
        nonzero: Variables above zero.
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

    @property
    def smoothing(self) -> float:
        r"""What the ridge costs: $\sum_i r_i'x_i - \min_{v \in C_i} r_i'v \ge 0$, zero when every x_i is LP-optimal."""
        return self.cost + float(self.lam @ self.gradient) - self.lower


class Dual(Protocol):
    """What an optimiser needs of a problem.

    Attributes:
        scale: Power of two by row, so that rows of `scale * A` have norms near one, shape (rows,), float64.
        free: Rows whose multiplier has no sign (equations), shape (rows,), bool.
        budgets: Right-hand sides b, shape (rows,), float64.
        blocks: Number of blocks of the whole problem.
        variables: Number of variables of the whole problem.
        ceiling: Greatest value that c'x takes on the blocks: a lower bound above it proves infeasibility.
        gamma_start: Ridge weight at which smoothing is comparable to the costs themselves.
    """

    scale: Tensor
    free: Tensor
    budgets: Tensor
    blocks: int
    variables: int
    ceiling: float
    gamma_start: float

    def evaluate(self, lam: Tensor, gamma: float, anchor: Tensor | None = None) -> Evaluation:
        """Evaluate at one point.

        Args:
            lam: Multipliers, shape (rows,), float64.
            gamma: Weight of the ridge.
            anchor: Proximal centre, or None for the origin.
        """
        ...

    def primal(self, lam: Tensor, gamma: float, anchor: Tensor | None = None) -> Tensor:
        """The projected primal (of this rank's blocks), before repair.

        Args:
            lam: Multipliers, shape (rows,), float64.
            gamma: Weight of the ridge.
            anchor: Proximal centre, or None for the origin.
        """
        ...

    def curvature(self, lam: Tensor, gamma: float, anchor: Tensor | None = None) -> Tensor:
        r"""Generalised Hessian of the negative dual, $A P A' / \gamma$ with P the derivative of the projections.

        Args:
            lam: Multipliers, shape (rows,), float64.
            gamma: Weight of the ridge.
            anchor: Proximal centre, or None for the origin.
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
    """

    def __init__(self, problem: MatchingProblem, group: Any = None) -> None:
        self.problem, self.group = problem, group
        self.budgets, self.free = problem.budgets, problem.equality
        self._start = time.monotonic()
        self._mean_elapsed = 0.0
        m = problem.rows
        statistics = torch.zeros(3 * m + 5, dtype=torch.float64)
        square, load, spent, totals = statistics.split([m, m, m, 5])
        for begin, end in problem.pieces():
            part = problem.slice(begin, end)
            u = problem.limits(begin, end)
            rows = part.index.reshape(part.variables, -1)
            c = part.cost.double().abs()
            a = torch.ones(rows.shape, dtype=torch.float64) if part.coefficient is None else part.coefficient.double()
            a = a.reshape(rows.shape)
            square.index_add_(0, rows.ravel(), a.square().ravel())
            load.index_add_(0, rows.ravel(), (a.abs() * u[:, None]).ravel())
            if rows.shape[1] == 1:
                spent.index_add_(0, rows[:, 0], c * u)
            lengths = part.offsets[1:] - part.offsets[:-1]
            totals += torch.stack([(c * u).sum(), u.square().sum(), lengths.sum(), c.sum(), u.sum()])
        nonnegative = torch.tensor([int(problem.nonnegative), problem.data.blocks, problem.skipped])
        if group is not None:
            torch.distributed.all_reduce(statistics, group=group)
            each = torch.tensor([1, 0, 0]) * nonnegative
            torch.distributed.all_reduce(each, op=torch.distributed.ReduceOp.MIN, group=group)
            torch.distributed.all_reduce(nonnegative, group=group)
            nonnegative[0] = each[0]
        self.repairable = bool(nonnegative[0]) and not problem.data.equality
        self.blocks, self.variables = int(nonnegative[1]), int(totals[2])
        self._square = square
        self.scale = torch.exp2(-torch.round(torch.log2(torch.where(square > 0, square, 1.0)) / 2))
        self.ceiling = float(totals[0]) * (1 + 1e-9)
        self.gamma_start = float(totals[3] / totals[2].clamp_min(1)) / max(
            float(totals[4] / totals[2].clamp_min(1)), 1e-300
        )
        cost, square, variables = totals[0], totals[1], totals[2]
        last = torch.stack([cost, 2.0 * square, cost, variables, variables])
        self._scale_now = _fixed_point(torch.cat([torch.stack([load, spent], 1).ravel(), last]))
        self._cost_bound, self._load_bound, self._exponent = float(cost), load, math.frexp(float(cost))[1]
        self._equations = self.free if bool(self.free.any()) else None
        self._single = problem.data.index.ndim == 1 or problem.data.index.shape[1] == 1

    def _scale(self, lam: Tensor) -> Tensor:
        # Bounds of every sum are known before it is taken; only that of the least values depends on the multipliers.
        exponent = math.frexp(self._cost_bound + float(lam.abs() @ self._load_bound))[1]
        if exponent != self._exponent:
            self._exponent, self._scale_now = exponent, self._scale_now.clone()
            self._scale_now[2 * lam.shape[0] + TOTALS.index("least")] = 2.0 ** min(60 - exponent, 900)
        return self._scale_now

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
            anchor: Proximal centre, shape (variables,), or None for the origin.

        Returns:
            Value, gradient and bounds.
        """
        sums, scale = self._sums(lam, gamma, anchor, None)
        gradient, shrink, found = dual_bounds(sums, scale, lam, self.budgets, free=self._equations, keep=KEEP)
        upper = math.inf
        if self.repairable:
            upper = found["repaired"] if self._single else self._repaired_cost(lam, gamma, anchor, shrink)
        return Evaluation(
            lam=lam,
            gamma=gamma,
            value=found["cost"] + gamma / 2 * found["square"] + found["priced"],
            gradient=gradient,
            lower=found["least"] - found["budget"],
            upper=upper,
            cost=found["cost"],
            shrink=shrink if self.repairable else None,
            violation=found["violation"],
            fractional=round(found["fractional"]),
            nonzero=round(found["nonzero"]),
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
            anchor: Proximal centre, shape (variables,), or None for the origin.

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
            anchor: Proximal centre, shape (variables,), or None for the origin.

        Returns:
            Shape (rows, rows), float64.
        """
        problem, rows, origin = self.problem, self.budgets.shape[0], self.problem.data.offsets[0]
        factor = 2.0 ** math.floor(60.0 - math.log2(max(float(self._square.max()), 1e-300)))
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
        anchor: Proximal centre of the run, shape (variables of the run,), or None.
        shrink: Repair factors per row, shape (rows,), or None.

    Returns:
        The primal, shape (variables of the run,), float64.
    """
    part = problem.slice(begin, end)
    scale = torch.ones(2 * lam.shape[0] + len(TOTALS), dtype=torch.float64)
    bounds = torch.tensor([0, part.blocks])
    _, x = dual_pass(part, lam, gamma, scale, bounds, anchor=anchor, shrink=shrink, primal=True, check=False)
    return x
