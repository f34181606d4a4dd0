"""What all optimizers share while they run: the best certified bounds so far, the history, and the reasons to stop."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polytope_lp.matching.evaluation import Dual, Evaluation
from polytope_lp.matching.options import Options
from polytope_lp.optimizers.vectors import dot

HISTORY = (
    *("evaluation", "seconds", "gamma", "proximal", "lower", "upper", "gap", "violation", "smoothing", "fractional"),
)
"""What an entry of the history holds."""
CROSSED = 1e-9
"""Relative gap below zero at which bounds contradict each other."""


def gap_unit(lower: float, unit: float) -> float:
    """What a gap is relative to.

    Args:
        lower: Lower bound of the optimum.
        unit: The most that one edge can add to the objective.

    Returns:
        max(|lower|, unit); 1 where both are zero or the bound is not finite.
    """
    return max(abs(lower) if math.isfinite(lower) else 0.0, unit) or 1.0


class FinishedError(Exception):
    """Ends a run from inside an evaluation; its argument is the status."""


@dataclass(frozen=True, eq=False)
class Incumbent:
    """The point whose repaired primal is the best so far.

    Attributes:
        evaluation: What was found there.
        anchor: The proximal center that was in force.
    """

    evaluation: Evaluation
    anchor: Tensor | None


@dataclass
class Search:
    """A run: evaluates the dual for an optimizer, keeps the best bounds, and stops when they meet.

    Attributes:
        dual: The problem.
        options: What the user asked for.
        report: Called with every entry of the history, or None.
        gamma: Weight of the ridge in force.
        anchor: Proximal center in force.
        lower: Best lower bound.
        price: Multipliers of the best lower bound.
        incumbent: Best primal.
        last: Last evaluation.
        history: One entry per evaluation.
        before: Seconds of the runs that this one resumes.
        engine: What the points come from: `dual` (ascent), or `highs`.
        residual: Last point whose violation and residual gap are within tol, where shrinking repairs nothing.
        margin: How far inside their budgets rows are aimed at, shape (rows,), float64, so that a point which is almost
            optimal for those is feasible; None before there is a `residual`.
    """

    dual: Dual
    options: Options
    report: Callable[[dict[str, Any]], None] | None = None
    gamma: float = 1.0
    anchor: Tensor | None = None
    lower: float = -math.inf
    price: Tensor | None = None
    incumbent: Incumbent | None = None
    last: Evaluation | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    before: float = 0.0
    engine: str = "dual"
    residual: Incumbent | None = None
    margin: Tensor | None = None

    @property
    def size(self) -> float:
        """What gaps are relative to: |lower bound|, but no less than what one edge can add to the objective."""
        return gap_unit(self.lower, self.dual.unit)

    @property
    def upper(self) -> float:
        """Best upper bound."""
        return self.incumbent.evaluation.upper if self.incumbent else math.inf

    @property
    def gap(self) -> float:
        """Certified relative gap; infinite while there is no upper bound."""
        return (self.upper - self.lower) / self.size

    def objective(self, mu: Tensor) -> tuple[float, Tensor]:
        """The negative smoothed dual in scaled multipliers, for a minimizer.

        Args:
            mu: Scaled multipliers, lambda / scale, shape (rows,), float64.

        Returns:
            Value and gradient.
        """
        found = self.dual.evaluate(mu * self.dual.scale, self.gamma, self.anchor)
        self._record(found)
        value, gradient = found.value, found.gradient
        if self.margin is not None:
            value, gradient = value + dot(found.lam, self.margin), gradient + self.margin
        return -value, -(gradient * self.dual.scale)

    def _record(self, found: Evaluation) -> None:
        self.last = found
        if found.lower > self.lower:
            self.lower, self.price = found.lower, found.lam
        best = self.incumbent.evaluation if self.incumbent else None
        if best is None or _rank(found, self.options.tol) < _rank(best, self.options.tol):
            self.incumbent = Incumbent(found, self.anchor)
        seconds = self.before + self.dual.elapsed()
        entry = {
            "evaluation": len(self.history) + 1,
            "seconds": round(seconds, 6),
            "gamma": self.gamma,
            "proximal": self.anchor is not None,
            "lower": self.lower,
            "upper": self.upper if math.isfinite(self.upper) else None,
            "gap": self.gap if math.isfinite(self.gap) else None,
            "violation": found.violation,
            "smoothing": found.smoothing / self.size,
            "fractional": found.fractional / max(1, self.dual.blocks),
        }
        self.history.append(entry)
        if self.report:
            self.report(entry)
        self._stop(found, seconds)

    def _stop(self, found: Evaluation, seconds: float) -> None:
        tol = self.options.tol
        if self.gap <= tol:
            # Bounds that cross by more than rounding contradict each other: nothing is claimed.
            raise FinishedError("optimal" if self.gap >= -CROSSED else "stalled")
        within = found.violation <= tol and abs(found.cost - self.lower) <= tol * self.size
        if within and found.shrink is None:
            self.residual = Incumbent(found, self.anchor)
        if self.lower > self.dual.ceiling:
            raise FinishedError("infeasible")
        if self.options.time_limit is not None and seconds >= self.options.time_limit:
            raise FinishedError("time_limit")
        if len(self.history) >= self.options.evaluations:
            raise FinishedError("evaluation_limit")

    def settled(self, status: str) -> str:
        """The status of a run that found no feasible point within tol, but one whose residuals are.

        Args:
            status: How the run ended.

        Returns:
            `optimal_residual` with that point as the incumbent, where there is one; else the status.
        """
        if self.residual is None or status not in {"stalled", "time_limit", "evaluation_limit"}:
            return status
        self.incumbent = self.residual
        return "optimal_residual"

    def recenter(self) -> None:
        """Move the proximal center to the primal of the last evaluation."""
        if self.last is not None:
            self.anchor = self.dual.primal(self.last.lam, self.gamma, self.anchor)

    def moved(self) -> float:
        r"""Proximal term $\gamma/2 \lVert x - p \rVert^2$ at the last evaluation: how far its primal is off the center.

        Returns:
            The term, in the unit of the objective.
        """
        found = self.last
        if found is None:
            return 0.0
        priced = dot(found.lam, found.gradient)
        moved = found.value - found.cost - priced
        return moved if moved > 1e-14 * (abs(found.value) + abs(found.cost) + abs(priced)) else 0.0

    def measured(self) -> tuple[float, float]:
        """The two parts of the gap at the last evaluation, both relative.

        Returns:
            What the ridge costs, and what optimization has left: infeasibility and its repair.

        Raises:
            RuntimeError: If nothing has been evaluated yet.
        """
        if self.last is None:
            raise RuntimeError("nothing has been evaluated yet")
        smoothing = max(self.last.smoothing, 0.0) / self.size
        upper = min(self.last.upper, self.upper)
        if math.isfinite(upper):
            return smoothing, max(self.gap - smoothing, 0.0)
        return smoothing, max(self.last.violation, abs(self.last.cost - self.last.smoothing - self.lower) / self.size)


def _rank(found: Evaluation, tol: float) -> tuple[float, float]:
    # Repaired cost where there is a repair, else violation first and cost among the equally feasible.
    if math.isfinite(found.upper):
        return (0.0, found.upper)
    return (1.0 + max(found.violation, tol), found.cost)


def zeros(dual: Dual) -> Tensor:
    """The multipliers at which every run starts.

    Args:
        dual: The problem.

    Returns:
        Zeros, shape (rows,), float64.
    """
    return torch.zeros(dual.budgets.shape[0], dtype=torch.float64)
