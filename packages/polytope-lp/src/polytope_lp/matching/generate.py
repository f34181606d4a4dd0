r"""Synthetic marketplaces: DuaLip's own generator, and one in which costs and values are not tied.

Destination j has breadth $\propto \mathrm{LN}(0, 1)$, scale $s_j \sim \mathrm{LN}(0, 1)$ and value
$v_j \sim \mathrm{LN}(-4, 0.75)$; source i has affinity $u_i \sim \mathrm{LN}(0, 0.5)$; an edge is worth
$\min(0.5, v_j u_i \varepsilon_{ij})$ with $\varepsilon_{ij} \sim \mathrm{LN}(0, 0.5)$.

Source: the DuaLip 5 benchmark generator for `tied`, in which the optimum is trivially $\sum_j b_j / s_j$ wherever every
budget binds. Departure: destinations are drawn per source instead of sources per destination, which has the same law
up to duplicate draws (dropped) and lets a problem of any size be written as a stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from core_tensor.checks import check_choice, check_number
from numpy.typing import NDArray

from polytope_lp.matching.choices import KINDS, SOURCES_PER_BATCH
from polytope_lp.matching.problem import MatchingProblem

GUIDES = 1 << 14
"""Intervals in which a drawn number finds its destination, so that no search is made for each."""


@dataclass(frozen=True)
class Marketplace:
    """What to generate.

    Attributes:
        sources: Number of sources.
        destinations: Number of destinations.
        degree: Mean number of edges per source.
        kind: `uncorrelated` (costs lognormal by destination and edge), `tied` (DuaLip's: cost proportional to value
            within a destination), `counts` (every edge costs one), `pacing` (as uncorrelated, with a second row per
            edge that limits the number of matches of its destination).
        seed: Seed of everything.
    """

    sources: int
    destinations: int = 1000
    degree: float = 10.0
    kind: str = "uncorrelated"
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("sources", self.sources, low=1, high=2**40, integer=True)
        check_number("destinations", self.destinations, low=1, high=2**31 - 1, integer=True)
        check_number("degree", self.degree, low=0.0, open_low=True, high=float(self.destinations))
        check_choice("kind", self.kind, KINDS)

    @property
    def rows_per_edge(self) -> int:
        """Coupling rows that contain an edge."""
        return 2 if self.kind == "pacing" else 1


@dataclass(frozen=True)
class EdgeBatch:
    """Edges of a run of sources, sorted by source and destination.

    Attributes:
        source: Sources, shape (edges,), int64.
        destination: Destinations, shape (edges,), int32.
        value: Values, shape (edges,), float32.
        cost: What the edges cost, shape (edges,), float32.
    """

    source: NDArray[np.int64]
    destination: NDArray[np.int32]
    value: NDArray[np.float32]
    cost: NDArray[np.float32]


class Budgets:
    """Accumulates, over the batches, what the budgets are made from; `finish` draws them.

    Args:
        market: What is generated.
    """

    def __init__(self, market: Marketplace) -> None:
        self.market = market
        self.greedy = np.zeros(market.destinations)
        self.total = np.zeros(market.destinations)
        self.count = np.zeros(market.destinations, dtype=np.int64)

    def add(self, batch: EdgeBatch) -> None:
        """Add a batch: loads if every source took its most valuable (tied: most costly) edge.

        Args:
            batch: Edges, sorted by source.
        """
        m = self.market.destinations
        key = batch.cost if self.market.kind == "tied" else batch.value
        change = np.diff(batch.source, prepend=-1) > 0
        block = np.cumsum(change) - 1
        best = np.flatnonzero(key == np.maximum.reduceat(key, np.flatnonzero(change))[block]) if key.size else block
        best = best[np.diff(block[best], prepend=-1) > 0]  # the first of equals
        self.greedy += np.bincount(batch.destination[best], batch.cost[best], m)
        self.total += np.bincount(batch.destination, batch.cost, m)
        self.count += np.bincount(batch.destination, minlength=m)

    def finish(self) -> NDArray[np.float64]:
        """Draw the budgets: U(0.5, 1) of the greedy load (tied), else U(0.3, 1) of it plus 5 % of the total.

        Returns:
            Budgets, shape (rows,), float64; with pacing, then limits on the number of matches.
        """
        random = np.random.default_rng([self.market.seed, 1])
        m = self.market.destinations
        if self.market.kind == "tied":
            return random.uniform(0.5, 1.0, m) * (self.greedy + 1e-8)
        b = random.uniform(0.3, 1.0, m) * (self.greedy + 0.05 * self.total)
        if self.market.kind != "pacing":
            return np.asarray(b)
        return np.concatenate([b, np.maximum(1.0, np.floor(random.uniform(0.02, 0.2, m) * self.count))])


def edge_batches(market: Marketplace) -> Iterator[EdgeBatch]:
    """The edges as a stream; every batch has its own seed, so batches can be made in any order.

    Args:
        market: What to generate.

    Yields:
        Batches by rising source.
    """
    m = market.destinations
    random = np.random.default_rng([market.seed, 0])
    breadth = random.lognormal(0.0, 1.0, m).cumsum()
    scale = random.lognormal(0.0, 1.0, m)
    value = random.lognormal(-4.0, 0.75, m)
    guide = np.searchsorted(breadth, np.arange(GUIDES) * (breadth[-1] / GUIDES), side="right")
    for number, begin in enumerate(range(0, market.sources, SOURCES_PER_BATCH)):
        random = np.random.default_rng([market.seed, 2, number])
        count = min(SOURCES_PER_BATCH, market.sources - begin)
        affinity = random.lognormal(0.0, 0.5, count)
        lengths = np.minimum(random.poisson(market.degree, count), m)
        block = np.repeat(np.arange(count), lengths)
        drawn = _drawn(breadth, guide, random.uniform(0.0, breadth[-1], block.size))
        key = np.sort(block * m + drawn)
        key = key[np.diff(key, prepend=-1) > 0]
        block, destination = np.divmod(key, m)
        worth = np.minimum(0.5, value[destination] * affinity[block] * random.lognormal(0.0, 0.5, key.size))
        if market.kind == "tied":
            cost = scale[destination] * worth
        elif market.kind == "counts":
            cost = np.ones(key.size)
        else:
            cost = scale[destination] * random.lognormal(0.0, 0.5, key.size)
        yield EdgeBatch(begin + block, destination.astype(np.int32), worth.astype(np.float32), cost.astype(np.float32))


def _drawn(breadth: NDArray[np.float64], guide: NDArray[np.int64], at: NDArray[np.float64]) -> NDArray[np.int64]:
    # First destination whose cumulated breadth is above each number, from the first one of its guide's interval.
    found = guide[np.maximum((at * (GUIDES / breadth[-1])).astype(np.int64) - 1, 0)]
    low = np.flatnonzero(breadth[found] <= at)
    while low.size:
        found[low] += 1
        low = low[found[low] < breadth.size - 1]
        low = low[breadth[found[low]] <= at[low]]
    return np.asarray(np.minimum(found, breadth.size - 1), dtype=np.int64)


def generate(market: Marketplace) -> MatchingProblem:
    """Generate a problem in memory: at most one match per source (simplex), values in float32.

    Args:
        market: What to generate.

    Returns:
        The problem; sources that drew no edge are skipped.
    """
    budgets = Budgets(market)
    lengths = np.zeros(market.sources, dtype=np.int64)
    columns: dict[str, list[Any]] = {"destination": [], "value": [], "cost": []}
    for batch in edge_batches(market):
        budgets.add(batch)
        begin = number_of(batch)
        lengths[begin : begin + SOURCES_PER_BATCH] = np.bincount(
            batch.source - begin, minlength=min(SOURCES_PER_BATCH, market.sources - begin)
        )
        for name, parts in columns.items():
            parts.append(getattr(batch, name))
    index, value, cost = (np.concatenate(columns.pop(name)) for name in ("destination", "value", "cost"))
    if market.kind == "pacing":
        index = np.stack([index, index + market.destinations], axis=1).astype(np.int32)
        cost = np.stack([cost, np.ones_like(cost)], axis=1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return MatchingProblem.from_arrays(offsets, index, value, cost, budgets.finish(), allow_unused=True)


def number_of(batch: EdgeBatch) -> int:
    """First source of the run of sources that a batch belongs to.

    Args:
        batch: Edges.

    Returns:
        The source.
    """
    return int(batch.source[0]) // SOURCES_PER_BATCH * SOURCES_PER_BATCH if batch.source.size else 0
