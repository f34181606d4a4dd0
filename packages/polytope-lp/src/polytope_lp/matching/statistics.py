r"""What a run must know of a problem before its first evaluation: the sizes of its rows, costs and amounts.

Every feasible amount of an edge is at most $t_e = \min(u_e, d_i / w_e, b_j / a_{je})$, where the last term ranges over
the packing rows of the edge: rows whose coefficients and budget are at least 0. An edge that can pay nothing ($c \ge 0$
in a problem that shrinking repairs) stays at zero for every price, so that it counts nowhere.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytope_lp.matching.problem import MatchingProblem

LOOSE_COST = 2.0
"""Presolve pays when it lowers the bound of the objective by this factor: the digits of all sums depend on it."""
LOOSE_ROW, LOOSE_EDGES = 2.0**14, 0.5
"""Presolve pays when it lowers the sum of squares of rows by this factor (their prices are off by the root), and this
share of the edges is in such rows."""


@dataclass(frozen=True, eq=False)
class Statistics:
    r"""Sums over all edges of a problem (of all ranks), with t the greatest feasible amount of each.

    Attributes:
        repairable: Whether shrinking repairs a primal: A, b at least 0, inequalities only, down-closed blocks.
        blocks: Number of blocks.
        variables: Number of variables.
        square: $\sum_e a_{je}^2$ by row, shape (rows,), float64.
        load: $\sum_e |a_{je}| u_e$ by row, a bound of $|A x|$, shape (rows,), float64.
        spent: $\sum_e |c_e| u_e$ by row where edges have one row, else zeros, shape (rows,), float64.
        row_unit: What violations of a row are relative to: $\max(|b_j|, \max_e |a_{je}| t_e)$, of a repairable problem
            $b_j$; 1 where that is 0; shape (rows,), float64.
        cost: $\sum_e |c_e| u_e$, a bound of the objective.
        tight_cost: $\sum_e |c_e| t_e$.
        amount_square: $\sum_e u_e^2$.
        cost_sum: $\sum_e |c_e|$.
        amount_sum: $\sum_e u_e$.
        unit: $\max_e |c_e| t_e$, the most that one edge can add to the objective.
        loose_edges: Edges in rows in which $\sum_e (a_{je} t_e)^2$ is below $\sum_e (a_{je} u_e)^2$ by `LOOSE_ROW`.
        free_edges: Whether some coefficient is 0.
    """

    repairable: bool
    blocks: int
    variables: int
    square: Tensor
    load: Tensor
    spent: Tensor
    row_unit: Tensor
    cost: float
    tight_cost: float
    amount_square: float
    cost_sum: float
    amount_sum: float
    unit: float
    loose_edges: float
    free_edges: bool

    @property
    def loose(self) -> bool:
        """Whether amounts are bounded so loosely that sums or prices lose their digits."""
        share = LOOSE_EDGES if self.repairable else 0.0  # without a repair, violations need the digits of every row
        return self.cost > LOOSE_COST * self.tight_cost or self.loose_edges > share * self.variables

    def arrays(self) -> dict[str, Tensor]:
        """Everything as arrays, for a packed problem.

        Returns:
            Every field by name.
        """
        dtypes: dict[Any, torch.dtype] = {bool: torch.bool, int: torch.int64}
        return {
            f.name: torch.as_tensor(getattr(self, f.name), dtype=dtypes.get(f.type, torch.float64)).reshape(-1)
            for f in fields(self)
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor], rows: int) -> "Statistics":
        """The inverse of `arrays`.

        Args:
            arrays: Every field by name.
            rows: Rows of the problem.

        Returns:
            The statistics.

        Raises:
            ValueError: If a field is missing, or of another type, shape or sign.
        """
        values: dict[str, Any] = {}
        for each in fields(cls):
            array = arrays.get(each.name)
            vector, flag = each.type is Tensor, each.type is bool
            if array is None or array.shape != (rows if vector else 1,) or (array.dtype == torch.bool) is not flag:
                raise ValueError(f"statistics: expected {each.name} with {rows if vector else 1} entries")
            if not flag and (bool((array < 0).any()) or not bool(torch.isfinite(array).all())):
                raise ValueError(f"statistics: expected {each.name} of at least 0 and finite")
            values[each.name] = array.double().clone() if vector else array.item()
        if values["row_unit"].numel() and not bool((values["row_unit"] > 0).all()):
            raise ValueError("statistics: expected row_unit above 0")
        return cls(**values)


def packing_rows(problem: MatchingProblem, group: Any = None) -> Tensor:
    """Rows that bound their edges' amounts by b / a: coefficients and budget at least 0.

    Args:
        problem: The problem, or this rank's shard.
        group: Process group of the shards, or None.

    Returns:
        Shape (rows,), bool.
    """
    least = torch.zeros(problem.rows, dtype=torch.float64)
    a = problem.data.coefficient
    if a is not None and a.numel() and bool(a.min() < 0):
        for begin, end in problem.pieces():
            part = problem.slice(begin, end)
            assert part.coefficient is not None
            least.scatter_reduce_(0, part.index.ravel().long(), part.coefficient.ravel().double(), "amin")
    if group is not None:
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=group)
    return (least >= 0) & (problem.budgets >= 0)


def tight_limits(
    rows: Tensor, a: Tensor | None, limits: Tensor, budgets: Tensor, packing: Tensor | None = None
) -> Tensor | None:
    """Greatest feasible amounts of a run of edges, where its packing rows lower them.

    Args:
        rows: Rows of the edges, shape (edges, rows per edge).
        a: Coefficients, shape (edges, rows per edge), float64; None for ones.
        limits: Greatest amounts that blocks allow, shape (edges,), float64.
        budgets: b, shape (rows,), float64.
        packing: Rows that count, shape (rows,), bool; None for all.

    Returns:
        Lower limits, shape (edges,), float64, or None where no row lowers any.
    """
    b = budgets[rows] if packing is None else torch.where(packing, budgets, torch.inf)[rows]
    use = limits[:, None] if a is None else a * limits[:, None]
    if not bool((use > b).any()):
        return None
    room = b if a is None else torch.where(a > 0, b / torch.where(a > 0, a, 1.0), torch.inf)
    return torch.minimum(limits, room.amin(1))


def measure(problem: MatchingProblem, group: Any = None) -> Statistics:
    """Read the problem once, where it does not know its statistics yet.

    Args:
        problem: The problem, or this rank's shard.
        group: Process group of the shards, or None.

    Returns:
        The statistics of the whole.

    Raises:
        ValueError: If the objective can exceed the range of float64.
    """
    if problem.statistics is not None:
        return problem.statistics
    m, agree = problem.rows, torch.tensor([int(problem.nonnegative and not problem.data.equality)])
    if group is not None:
        torch.distributed.all_reduce(agree, op=torch.distributed.ReduceOp.MIN, group=group)
    repairable = bool(agree)
    packing = None if repairable else packing_rows(problem, group)
    sums = torch.zeros(3 * m + 7, dtype=torch.float64)
    square, load, spent, totals = sums.split([m, m, m, 7])
    most = torch.zeros(m + 3, dtype=torch.float64)
    largest, unit, free, lowered = most.split([m, 1, 1, 1])
    for begin, end in problem.pieces():
        part = problem.slice(begin, end)
        rows = part.index.reshape(part.variables, -1)
        a = None if part.coefficient is None else part.coefficient.double().reshape(rows.shape)
        u, c = problem.limits(begin, end), part.cost.double()
        c = (-c).clamp_min(0) if repairable else c.abs()
        if repairable:
            u = torch.where(c > 0, u, 0.0)  # what can pay nothing stays at zero
        lower = tight_limits(rows, a, u, problem.budgets, packing)
        t, at = u if lower is None else lower, rows.ravel()
        use = u[:, None].expand(rows.shape) if a is None else a.abs() * u[:, None]
        load.index_add_(0, at, use.ravel())
        square.index_add_(0, at, torch.ones_like(use).ravel() if a is None else a.square().ravel())
        if rows.shape[1] == 1:
            spent.index_add_(0, at, c * u)
        if not repairable:
            tighter = t[:, None].expand(rows.shape) if a is None else a.abs() * t[:, None]
            largest.scatter_reduce_(0, at.long(), tighter.ravel(), "amax")
        if lower is not None:
            lowered.fill_(1.0)
        parts = [
            _sum(c * u),
            _sum(c * t),
            _sum(u.square()),
            _sum(c),
            _sum(u),
            float(part.blocks),
            float(part.variables),
        ]
        totals += torch.tensor(parts, dtype=torch.float64)
        unit.copy_(torch.maximum(unit, (c * t).amax() if c.numel() else unit))
        if a is not None and bool((a == 0).any()):
            free.fill_(1.0)
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
    b = problem.budgets.abs()
    row_unit = b if repairable else torch.maximum(b, largest)
    cost, tight_cost, amount_square, cost_sum, amount_sum, blocks, variables = totals.tolist()
    if not math.isfinite(cost):
        raise ValueError("values: expected an objective within the range of float64, got values and amounts beyond it")
    return Statistics(
        repairable=repairable,
        blocks=int(blocks),
        variables=int(variables),
        square=square.clone(),
        load=load.clone(),
        spent=spent.clone(),
        row_unit=torch.where(row_unit > 0, row_unit, 1.0),
        cost=cost,
        tight_cost=tight_cost,
        amount_square=amount_square,
        cost_sum=cost_sum,
        amount_sum=amount_sum,
        unit=float(unit),
        loose_edges=_loose_edges(problem, packing, repairable, group) if bool(lowered) else 0.0,
        free_edges=bool(free),
    )


def _loose_edges(problem: MatchingProblem, packing: Tensor | None, repairable: bool, group: Any) -> float:
    # Edges of rows whose sum of squares falls much when the rows bound their edges.
    m = problem.rows
    found = torch.zeros(3, m, dtype=torch.float64)
    for begin, end in problem.pieces():
        part = problem.slice(begin, end)
        rows = part.index.reshape(part.variables, -1).long()
        a = None if part.coefficient is None else part.coefficient.double().reshape(rows.shape)
        u = problem.limits(begin, end)
        if repairable:
            u = torch.where(part.cost < 0, u, 0.0)
        lower = tight_limits(rows, a, u, problem.budgets, packing)
        for total, t in zip(found, (u, u if lower is None else lower), strict=False):
            use = t[:, None].expand(rows.shape) if a is None else a * t[:, None]
            total.index_add_(0, rows.ravel(), use.square().ravel())
        found[2] += torch.bincount(rows.ravel(), minlength=m)
    if group is not None:
        torch.distributed.all_reduce(found, group=group)
    wide, tight, edges = found
    return float(edges[wide > LOOSE_ROW * tight].sum())


def _sum(values: Tensor) -> float:
    # numpy's order of summation does not depend on the number of threads
    return float(np.add.reduce(values.numpy()))


@dataclass(frozen=True, eq=False)
class Presolved:
    """A problem in amounts of order one.

    Attributes:
        problem: What is solved; the problem itself where amounts are bounded tightly enough.
        column: Units of the amounts, powers of two, shape (variables,), float64; None for ones.
        statistics: Those of `problem`, but with `unit` in the same unit of value as before.
    """

    problem: MatchingProblem
    column: Tensor | None
    statistics: Statistics


def presolve(problem: MatchingProblem, group: Any = None) -> Presolved:
    r"""Bound every amount by what its rows allow, and measure it in units of that bound, where bounds are loose.

    With $x = 2^k y$ and $t \le 2^k$ the same LP has costs $2^k c$, coefficients $2^k a$, weights $2^k w$ and bounds
    $t / 2^k \le 1$; rows, budgets and prices stay, and powers of two change no digit. Every point of the original rows
    and blocks keeps the tighter bounds, so optimum and certificates are those of the original.

    Args:
        problem: The problem, or this rank's shard.
        group: Process group of the shards, or None.

    Returns:
        What is solved.
    """
    found = measure(problem, group)
    if not found.loose:
        return Presolved(problem, None, found)
    packing = None if found.repairable else packing_rows(problem, group)
    d, n = problem.data, problem.data.variables
    column, upper = torch.ones(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
    reachable = torch.ones(1, dtype=torch.int64)
    for begin, end in problem.pieces():
        part = problem.slice(begin, end)
        at = slice(int(part.offsets[0] - d.offsets[0]), int(part.offsets[-1] - d.offsets[0]))
        rows = part.index.reshape(part.variables, -1).long()
        a = None if part.coefficient is None else part.coefficient.double().reshape(rows.shape)
        u = problem.limits(begin, end)
        lower = tight_limits(rows, a, u, problem.budgets, packing)
        t = u if lower is None else lower
        if problem.data.equality:
            block = torch.repeat_interleave(torch.arange(part.blocks), part.offsets[1:] - part.offsets[:-1])
            filled = torch.zeros(part.blocks, dtype=torch.float64)
            filled.index_add_(0, block, t if part.weight is None else t * part.weight.double())
            reachable *= int(bool((filled >= part.cap.expand(part.blocks)).all()))
        unit = torch.where(t > 0, torch.exp2(torch.frexp(t).exponent.double().clamp(-1000, 1000)), 1.0)
        column[at], upper[at] = unit, t / unit
    if group is not None:
        torch.distributed.all_reduce(reachable, op=torch.distributed.ReduceOp.MIN, group=group)
    if not int(reachable):  # a block cannot be filled within the rows: left to the proof of infeasibility
        return Presolved(problem, None, found)
    a = torch.ones(d.index.shape, dtype=torch.float64) if d.coefficient is None else d.coefficient.double()
    capped = bool(torch.isfinite(d.cap).any())
    weight = torch.ones(n, dtype=torch.float64) if d.weight is None else d.weight.double()
    data = replace(
        d,
        cost=d.cost.double() * column,
        coefficient=a * (column if a.ndim == 1 else column[:, None]),
        upper=upper,
        weight=weight * column if capped else None,
    )
    work = replace(problem, data=data)
    return Presolved(work, column, replace(measure(work, group), unit=found.unit))
