r"""From fractional amounts to whole ones that keep every budget and every source's polytope.

At a vertex of the LP at most as many blocks are fractional as budgets bind, so little is lost: amounts are rounded
down, then units are given back, first where the fractions were largest, then wherever profit
$v - \sum_k a_k \lambda_k$ and slack remain. Every round, each source proposes its best candidate, and those are
accepted whose running sums by rank fit into what the budgets have left; so no order of summation can exceed one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from core_tensor.checks import check_choice
from numpy.typing import NDArray

if TYPE_CHECKING:
    from polytope_lp.matching.problem import MatchingProblem

Array = NDArray[np.float64]
SAFE = 1.0 - 1e-12
"""Part of a budget that may be used, so that no order of summation exceeds it; all of it where costs are whole."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """Whole amounts.

    Attributes:
        x: Amounts, whole, shape (variables,), float64.
        value: What they are worth.
        bound: Certified upper bound of the value of any allocation, whole or not.
        load: What they take from the budgets, shape (rows,), float64.
        changed: Sources whose amounts were not whole before.
        proved: Whether no whole allocation is worth more: the bound, or what of it whole values can reach, is met.
    """

    x: Array
    value: float
    bound: float
    load: Array
    changed: int
    proved: bool = False

    @property
    def gap(self) -> float:
        """(bound - value) / |bound|: at most this part was lost."""
        return (self.bound - self.value) / (abs(self.bound) or 1.0)


def round_allocation(
    problem: "MatchingProblem", amounts: Array, lam: Array, bound: float, method: str = "greedy", seed: int = 0
) -> Rounded:
    """Round an allocation to whole amounts within budgets.

    Args:
        problem: A whole problem (no shard) that shrinking repairs: A and b at least 0, rows and blocks `<=`.
        amounts: The allocation, within budgets and blocks, shape (variables,), float64.
        lam: Prices of the rows, shape (rows,), float64.
        bound: Certified upper bound of the value of any allocation.
        method: `greedy` gives units back by the size of their fractions; `random` with probabilities equal to the
            fractions, so that over seeds every edge is treated alike.
        seed: Seed of `random`.

    Returns:
        The whole amounts.

    Raises:
        ValueError: If the problem has equations or negative coefficients, where rounding down is not safe.
    """
    check_choice("method", method, ("greedy", "random"))
    if not problem.nonnegative or problem.data.equality or problem.sharded:
        raise ValueError("problem: expected a whole problem with A, b >= 0 and inequalities only")
    state = _State(problem, amounts, lam)
    fraction = amounts - state.x
    fraction[fraction < 1e-9] = 0.0
    changed = int(np.unique(state.block[fraction > 0]).size)
    rank = fraction
    if method == "random":
        rank = np.where(np.random.default_rng(seed).random(fraction.size) < fraction, fraction, 0.0)
    state.give(rank)
    state.give(state.profit)
    state.give(state.value)  # what is left goes to whoever fits: no unit can be added in the end
    value = float(state.value @ state.x)
    return Rounded(state.x, value, bound, state.load(), changed)


class _State:
    """Whole amounts, and what sources and budgets have left."""

    def __init__(self, problem: "MatchingProblem", amounts: Array, lam: Array) -> None:
        d = problem.data
        n = d.variables
        self.rows = d.index.numpy().reshape(n, -1)
        ones = np.ones(self.rows.shape)
        self.a = ones if d.coefficient is None else d.coefficient.double().numpy().reshape(self.rows.shape)
        self.block = np.repeat(np.arange(d.blocks), np.diff(d.offsets.numpy()))
        self.weight = np.ones(n) if d.weight is None else d.weight.double().numpy()
        self.value = -d.cost.double().numpy()
        whole = np.bincount(self.rows.ravel(), (self.a != np.round(self.a)).ravel(), problem.rows) == 0
        self.budgets = problem.budgets.numpy() * np.where(whole, 1.0, SAFE)
        self.limit = np.floor(problem.limits(0, d.blocks).numpy() + 1e-9)
        self.x = np.minimum(np.floor(amounts), self.limit)
        self.profit = self.value - (self.a * lam[self.rows]).sum(1)
        self.profit[self.value <= 0] = 0.0
        used = np.bincount(self.block, self.weight * self.x, d.blocks)
        self.room = np.broadcast_to(d.cap.numpy(), (d.blocks,)) - used

    def load(self) -> Array:
        # What the amounts take from the budgets.
        return np.asarray(np.bincount(self.rows.ravel(), (self.a * self.x[:, None]).ravel(), self.budgets.size), float)

    def give(self, rank: Array, rounds: int = 1000) -> None:
        # Give units to candidates of positive rank, as far as they fit.
        open_ = np.flatnonzero((rank > 0) & (self.x < self.limit))
        left = self.budgets - self.load()
        for _ in range(rounds):
            fits = (self.weight[open_] <= self.room[self.block[open_]] * (1 + 1e-12)) & (
                (self.a[open_] <= left[self.rows[open_]]) | (self.a[open_] == 0)
            ).all(1)
            open_ = open_[fits & (self.x[open_] < self.limit[open_])]
            if not open_.size:
                return
            order = open_[np.lexsort((-rank[open_], self.block[open_]))]
            best = order[np.flatnonzero(np.diff(self.block[order], prepend=-1))]
            best = best[np.argsort(-rank[best], kind="stable")]
            taken = best[self._prefix(best, left)]
            self.x[taken] += 1.0
            np.subtract.at(self.room, self.block[taken], self.weight[taken])
            left = self.budgets - self.load()

    def _prefix(self, best: NDArray[np.int64], left: Array) -> NDArray[np.bool_]:
        # Proposals, by falling rank, whose running sum in every one of their rows fits into what is left.
        ok = np.ones(best.size, dtype=bool)
        for k in range(self.rows.shape[1]):
            row, a = self.rows[best, k], self.a[best, k]
            order = np.argsort(row, kind="stable")
            total = np.cumsum(a[order])
            first = np.searchsorted(row[order], row[order])
            before = np.where(first > 0, total[first - 1], 0.0)
            ok[order] &= (total - before <= left[row[order]]) | (a[order] == 0)
        return ok
