"""What `solve` returns: prices, certified bounds, and the primal as a stream."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from core_tensor.checks import check_choice
from numpy.typing import NDArray
from torch import Tensor

from polytope_lp.matching.evaluation import FusedDual, primal_piece
from polytope_lp.matching.exact import takes_units, whole_allocation, whole_within_rows
from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.matching.search import Search
from polytope_lp.matching.statistics import Presolved
from polytope_lp.matching.verify import check_claims
from polytope_lp.serving.pacing import pacing_report
from polytope_lp.serving.rounding import Rounded, round_allocation


@dataclass(frozen=True, eq=False)
class Solution:
    r"""A primal and dual pair of $\min c'x$, $A x \le b$, $x_i \in C_i$, with bounds that certify it.

    Attributes:
        status: `optimal` (gap certified), `optimal_residual` (violation and residual gap are within tol, and no
            feasible point was found; never where shrinking repairs), `infeasible` (a lower bound exceeds every value
            the objective can take), `time_limit`, `evaluation_limit` or `stalled` (float64 allows no further progress).
        lam: Prices: multipliers of the best lower bound, shape (rows,), float64.
        objective: Cost $c'x$ of the primal.
        lower_bound: Certified lower bound of the optimum.
        upper_bound: Cost of the feasible primal, infinite if there is none.
        gap: (upper - lower) / max(|lower|, unit).
        max_violation: Greatest violation of a row by the primal, over its unit (the budget; without a repair the
            greatest of the budget and what one edge can take from it); zero after repair.
        load: $A x$ of the primal, shape (rows,), float64.
        evaluations: Evaluations of the dual.
        seconds: Wall time of the run.
        history: One entry per evaluation: bounds, gap, violation, ridge, share of fractional blocks.
        gamma: Ridge weight of the primal.
        primal_lam: Multipliers whose projection is the primal, shape (rows,), float64.
        shrink: Repair factors of the primal per row, or None.
        anchor: Proximal center of the primal, or None.
        problem: The problem (or this rank's shard).
        tol: Gap that was asked for.
        unit: The most that one edge can add to the objective; where shrinking repairs, the optimum is no smaller.
        presolved: The problem in the units in which it was solved.
        engine: What the last point came from: `dual` (ascent), or `highs` where that made no progress.
    """

    status: str
    lam: Tensor
    objective: float
    lower_bound: float
    upper_bound: float
    gap: float
    max_violation: float
    load: Tensor
    evaluations: int
    seconds: float
    history: list[dict[str, Any]] = field(repr=False)
    gamma: float
    primal_lam: Tensor = field(repr=False)
    shrink: Tensor | None = field(repr=False)
    anchor: Tensor | None = field(repr=False)
    problem: MatchingProblem = field(repr=False)
    tol: float
    unit: float
    presolved: Presolved = field(repr=False)
    engine: str = "dual"

    @classmethod
    def from_search(
        cls, problem: MatchingProblem, presolved: Presolved, search: Search, status: str, group: Any = None
    ) -> "Solution":
        """Gather what a finished run found.

        Args:
            problem: The problem, or this rank's shard.
            presolved: The same in the units in which it was solved.
            search: The run.
            status: How it ended.
            group: Process group of the shards, or None.

        Returns:
            The solution.

        Raises:
            RuntimeError: If the run has evaluated nothing.
        """
        if search.incumbent is None or search.price is None:
            raise RuntimeError("the run ended before its first evaluation")
        best, anchor = search.incumbent.evaluation, search.incumbent.anchor
        draft = cls(
            status=status,
            lam=search.price,
            objective=best.upper if best.shrink is not None else best.cost,
            lower_bound=search.lower,
            upper_bound=search.upper,
            gap=search.gap,
            max_violation=best.violation,
            load=best.gradient + search.dual.budgets,
            evaluations=len(search.history),
            seconds=search.history[-1]["seconds"],
            history=search.history,
            gamma=best.gamma,
            primal_lam=best.lam,
            shrink=best.shrink,
            anchor=anchor,
            problem=problem,
            tol=search.options.tol,
            unit=presolved.statistics.unit,
            presolved=presolved,
            engine=search.engine,
        )
        return draft if best.shrink is None else draft._with_repaired_load(search.dual.budgets, group)

    def _with_repaired_load(self, budgets: Tensor, group: Any) -> "Solution":
        rows_per_variable = self.problem.data.index.reshape(self.problem.data.variables, -1).shape[1]
        if rows_per_variable == 1 and self.shrink is not None:
            load = self.load * self.shrink
        else:
            load = torch.zeros_like(budgets)
            for begin, end, x in self._pieces():
                part = self.problem.slice(begin, end)
                rows = part.index.reshape(part.variables, -1)
                a = torch.ones(rows.shape, dtype=torch.float64) if part.coefficient is None else part.coefficient
                load.index_add_(0, rows.ravel(), (a.double().reshape(rows.shape) * x[:, None]).ravel())
            if group is not None:
                torch.distributed.all_reduce(load, group=group)
        excess = ((load - budgets) / self.presolved.statistics.row_unit).clamp_min(0)
        values = {**self.__dict__, "load": load, "max_violation": float(excess.max()) if excess.numel() else 0.0}
        return Solution(**values)

    def _pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """First block, block after the last, and primal of every run of blocks."""
        for begin, end in self.problem.pieces():
            yield begin, end, torch.from_numpy(self._amounts(begin, end))

    def _amounts(self, begin: int, end: int) -> NDArray[np.float64]:
        """Primal of a run of blocks, from its first block to the one after its last."""
        offsets, work = self.problem.data.offsets, self.presolved
        at = slice(int(offsets[begin] - offsets[0]), int(offsets[end] - offsets[0]))
        anchor = None if self.anchor is None else self.anchor[at]
        x = primal_piece(work.problem, begin, end, self.primal_lam, self.gamma, anchor, self.shrink)
        return (x if work.column is None else x * work.column[at]).numpy()

    def x(self) -> Tensor:
        """The whole primal of this process's blocks.

        Returns:
            Shape (variables,), float64.
        """
        parts = [x for _, _, x in self._pieces()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def primal(self) -> pa.RecordBatchReader:
        """The nonzeros of the primal as a stream of Arrow batches, in the order of the sources.

        Returns:
            A reader of columns source, destination (of the first row of the edge) and x.
        """
        schema = primal_schema(self.problem)
        return pa.RecordBatchReader.from_batches(schema, self._batches(schema))

    def _batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        problem = self.problem
        for begin, end, x in self._pieces():
            part = problem.slice(begin, end)
            at = torch.nonzero(x > 0).ravel()
            block = torch.searchsorted(part.offsets - part.offsets[0], at, right=True) - 1 + begin
            row = part.index.reshape(part.variables, -1)[at, 0].long()
            source = _named(problem.source_keys, block, problem.first_block)
            destination = _named(problem.destination_keys, row, 0)
            yield pa.record_batch([source, destination, pa.array(x[at].numpy())], schema=schema)

    def prices(self) -> pa.Table:
        """Budgets, loads and prices by destination.

        Returns:
            Columns destination, resource (where a destination has several budgets), budget, load, price (what one more
            unit of budget adds to the value; negative where the budget is a minimum), used (load / budget).
        """
        problem, sign = self.problem, self.problem.row_sign
        budget, load = sign * problem.budgets, sign * self.load
        used = torch.where(budget != 0, load / torch.where(budget != 0, budget, 1.0), torch.nan)
        return pa.table(
            {
                **row_columns(problem),
                "budget": budget.numpy(),
                "load": load.numpy(),
                "price": (sign * self.lam).numpy(),
                "used": pa.array(used.numpy(), from_pandas=True),
            }
        )

    def sensitivity(self) -> pa.Table:
        r"""What one more unit of each budget is worth, $\partial \text{value} / \partial b = \lambda$.

        By the envelope theorem the value also changes by $x_e$ per unit of an edge's value and by $-\lambda_j x_e$ per
        unit of its cost; gradients of the allocation itself are those of `polytope_lp.ridge_allocation`.

        Returns:
            Columns destination (and resource), budget, price, elasticity (percent of value per percent of budget) and
            binding (whether the price is positive and the budget used up to 0.1 %), in the order of the rows.
        """
        sign = self.problem.row_sign
        lam, budget = sign * self.lam, sign * self.problem.budgets
        size = max(abs(self.objective), 1e-300)
        full = self.load >= self.problem.budgets - 1e-3 * budget.abs()
        return pa.table(
            {
                **row_columns(self.problem),
                "budget": budget.numpy(),
                "price": lam.numpy(),
                "elasticity": (lam * budget / size).numpy(),
                "binding": ((lam != 0) & full).numpy(),
            }
        )

    def value_bound(self, budgets: Any) -> float:
        r"""How much could be gained at most if the budgets were others: a certified bound, without solving again.

        Args:
            budgets: Other right-hand sides b', shape (rows,).

        Returns:
            $-\text{lower} + \lambda'(b' - b)$, which no allocation within b' exceeds (weak duality at these prices).

        Raises:
            ValueError: If the shape does not fit or a value is not finite.
        """
        other = torch.as_tensor(budgets, dtype=torch.float64).reshape(-1)
        if other.shape != self.problem.budgets.shape or not bool(torch.isfinite(other).all()):
            raise ValueError(f"budgets: expected {self.problem.rows} finite values, got shape {tuple(other.shape)}")
        return -self.lower_bound + float(self.lam @ (self.problem.row_sign * other - self.problem.budgets))

    def rounded(self, method: str = "greedy", seed: int = 0) -> "Rounded":
        """Whole amounts within every budget and source.

        Where shrinking repairs, amounts are rounded down and units given back, see
        `polytope_lp.serving.rounding.round_allocation`. Elsewhere (minimums, equations, sources that must be filled)
        the sources with fractions are decided by integer programs, see
        `polytope_lp.matching.exact.whole_within_rows`.

        Args:
            method: `greedy`, `random` (where shrinking repairs), or `exact`: the best there are. That is quick where
                every edge takes one unit from one budget, and else an integer program of the edges that can matter.
            seed: Seed of `random`.

        Returns:
            Amounts, value, and how far it is at most from the best.
        """
        problem, x, lam = self.problem, self.x().numpy(), self.lam.numpy()
        if not problem.nonnegative or problem.data.equality:
            check_choice("method", method, ("greedy", "exact"))
            return whole_within_rows(problem, x, lam, -self.lower_bound, exact=method == "exact")
        if method == "exact":
            if takes_units(problem):
                return whole_allocation(problem, x, lam, -self.lower_bound)
            return whole_within_rows(problem, x, lam, -self.lower_bound, exact=True)
        return round_allocation(problem, x, lam, -self.lower_bound, method, seed)

    def pacing(self, spent: Any, elapsed: float) -> pa.Table:
        """Live spending against this plan; see `polytope_lp.serving.pacing.pacing_report`.

        Args:
            spent: What every budget has spent so far, shape (rows,).
            elapsed: Part of the period that has passed, in (0, 1].

        Returns:
            One row per budget.
        """
        return pacing_report(self.prices(), spent, elapsed)

    @property
    def policy_lam(self) -> Tensor:
        """Prices at which a policy allocates, shape (rows,): those of the primal; with a center, of the best bound."""
        return self.primal_lam if self.anchor is None else self.lam

    def policy_ridge(self) -> float:
        """The ridge at which the prices alone allocate best.

        Returns:
            The run's own; where sources at request time lack what the run had (a proximal center, or other units of
            their amounts), the one of a few smaller ones with the best repaired value on the problem itself.
        """
        if self.anchor is None and self.presolved.column is None:
            return self.gamma
        dual = FusedDual(self.problem)
        first = self.gamma if self.presolved.column is None else dual.gamma_start
        grid = [first * 10.0**-k for k in range(5)]
        if not dual.repairable:
            return grid[2]
        return min(grid, key=lambda gamma: dual.evaluate(self.policy_lam, gamma).upper)

    def destination_keys(self) -> NDArray[Any] | None:
        """What a policy calls the destinations.

        Returns:
            Shape (destinations,), integers or text; None for 0, 1, 2, ...
        """
        keys = self.problem.destination_keys
        return None if keys is None else policy_keys(keys)

    def certificate(self) -> dict[str, Any]:
        """The claims of this solution as JSON; infinities become null.

        Returns:
            Status, bounds, gap, violation and sizes.
        """
        finite = torch.isfinite(torch.tensor([self.upper_bound, self.gap]))
        return {
            "status": self.status,
            "objective": self.objective,
            "lower_bound": self.lower_bound,
            "upper_bound": self.upper_bound if finite[0] else None,
            "gap": self.gap if finite[1] else None,
            "max_violation": self.max_violation,
            "tol": self.tol,
            "unit": self.unit,
            "gamma": self.gamma,
            "proximal": self.anchor is not None,
            "engine": self.engine,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "sources": self.problem.data.blocks,
            "skipped_sources": self.problem.skipped,
            "edges": self.problem.data.variables,
            "destinations": self.problem.rows,
        }

    def verify(self) -> dict[str, Any]:
        """Recompute every claim with numpy in float64, without the kernels that made it.

        Returns:
            See `polytope_lp.matching.verify.check_claims`.
        """
        return check_claims(self.problem, self._amounts, self.lam.numpy(), self.certificate())


def row_columns(problem: MatchingProblem) -> dict[str, pa.Array]:
    """What the user calls the rows.

    Args:
        problem: The problem.

    Returns:
        Columns `destination`, and `resource` where every destination has several budgets.
    """
    row = torch.arange(problem.rows)
    columns = {"destination": _named(problem.destination_keys, row % problem.destinations, 0)}
    if problem.resources:
        columns["resource"] = pa.array([problem.resources[k] for k in (row // problem.destinations).tolist()])
    return columns


def primal_schema(problem: MatchingProblem) -> pa.Schema:
    """The columns of a primal stream.

    Args:
        problem: The problem.

    Returns:
        Types of source, destination and x.
    """
    source = pa.int64() if problem.source_keys is None else problem.source_keys.type
    destination = pa.int64() if problem.destination_keys is None else problem.destination_keys.type
    return pa.schema([("source", source), ("destination", destination), ("x", pa.float64())])


def _named(keys: Any, numbers: Tensor, first: int) -> pa.Array:
    return pa.array((numbers + first).numpy()) if keys is None else keys.take(pa.array(numbers.numpy()))


def policy_keys(keys: pa.Array) -> NDArray[Any]:
    """Keys as a policy holds them, with nothing but numpy: integers, or text (hexadecimal for bytes, ISO for times).

    Args:
        keys: Integers, text, bytes, dates or timestamps.

    Returns:
        The keys, an integer or a text dtype.
    """
    if pa.types.is_integer(keys.type):
        return np.asarray(keys, dtype=np.int64)
    values = keys.to_pylist()
    if values and isinstance(values[0], bytes):
        return np.array([value.hex() for value in values], dtype=str)
    return np.array([value if isinstance(value, str) else value.isoformat() for value in values], dtype=str)
