"""The matching problem: one coupling row (or a few) per edge, one small polytope per source."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from core_tensor import BlockData
from core_tensor.checks import check_tensor
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from polytope_lp.polytopes import CappedBox

if TYPE_CHECKING:
    from polytope_lp.matching.statistics import Statistics

CHUNKS = 64
"""Most chunks in which sums are taken; the number depends on the problem alone, never on threads or ranks."""


@dataclass(frozen=True, eq=False)
class MatchingProblem:
    r"""$\min c'x$ subject to $A x \le b$ (or $=$ in some rows) and $x_i \in C_i$, with few rows per variable.

    Build it with `from_arrays`, or from tables with `polytope_lp.from_arrow` and `polytope_lp.read_problem`.

    Attributes:
        data: Blocks, costs, rows and coefficients, with the polytopes' parameters.
        budgets: Right-hand sides b, shape (rows,), float64.
        equality: Which rows are equations, shape (rows,), bool.
        at_least: Rows that the user states as `>=`; they are held with the opposite sign, as `<=`. Shape (rows,), bool,
            or None for none.
        bounds: Blocks at which the chunks of the sums begin and end, shape (chunks + 1,), int64.
        source_keys: What the user calls the blocks: an Arrow array, or None for 0, 1, 2, ...
        destination_keys: What the user calls the rows: an Arrow array, or None for 0, 1, 2, ...
        skipped: Sources without edges, which were left out.
        first_block: Number of the first block within the whole problem, for shards.
        sharded: Whether this is the part of one rank.
        resources: Names of the budgets, where every destination has several; row k * destinations + j is budget k of
            destination j.
        statistics: What `measure` finds in the whole problem, where it is known (packed problems); a changed copy of
            the problem does not have it.
    """

    data: BlockData
    budgets: Tensor
    equality: Tensor
    bounds: Tensor
    source_keys: Any = None
    destination_keys: Any = None
    skipped: int = 0
    first_block: int = 0
    sharded: bool = field(default=False)
    resources: tuple[str, ...] = ()
    at_least: Tensor | None = None
    statistics: "Statistics | None" = field(default=None, init=False)

    @classmethod
    def from_arrays(
        cls,
        offsets: ArrayLike | Tensor,
        index: ArrayLike | Tensor,
        value: ArrayLike | Tensor,
        cost: ArrayLike | Tensor | None,
        budgets: ArrayLike | Tensor,
        polytope: CappedBox | None = None,
        *,
        equality: ArrayLike | Tensor | None = None,
        at_least: ArrayLike | Tensor | None = None,
        source_keys: Any = None,
        destination_keys: Any = None,
        resources: tuple[str, ...] = (),
        allow_unused: bool = False,
        minimize: bool = False,
    ) -> "MatchingProblem":
        """Build a problem from arrays and check all of it.

        Args:
            offsets: Bounds of the sources' edges, shape (sources + 1,), int64. Empty sources are skipped and counted.
            index: Destination of every edge, shape (edges,) or (edges, rows per edge).
            value: Value of every edge, which is maximized (costs are its negative), shape (edges,). Stored in float32
                if it is float32, else in float64.
            cost: What an edge takes from its destination's budget, shape and order of `index`; None for one.
            budgets: Budgets b, shape (destinations,).
            polytope: What a source may do; `simplex(1)` if None.
            equality: Rows that must be met exactly, shape (destinations,), bool.
            at_least: Rows of which the budget is a minimum (guaranteed delivery, floors), shape (destinations,), bool.
            source_keys: Names of the sources.
            destination_keys: Names of the destinations.
            resources: Names of the budgets where every destination has several; `budgets` then holds those of the first
                for all destinations, then those of the second, and so on.
            allow_unused: Whether budgets without any edge are allowed.
            minimize: Whether `value` holds what is minimized, which is then stored without a copy.

        Returns:
            The problem.

        Raises:
            ValueError: If a value is not finite, an id unknown, an edge duplicate, a budget unused, or a shape wrong.
            TypeError: If an array is not numeric.
        """
        lengths = torch.as_tensor(offsets, dtype=torch.int64)
        raw = torch.as_tensor(value)
        if not raw.is_floating_point():
            raw = raw.double()
        b = torch.tensor(np.asarray(budgets), dtype=torch.float64).reshape(-1)
        if not bool(torch.isfinite(b).all()):
            raise ValueError(f"budgets: expected finite values, got {b[~torch.isfinite(b)][0]}")
        shape = polytope or CappedBox()
        keep = lengths[1:] > lengths[:-1]
        skipped = int((~keep).sum())
        if skipped:
            if isinstance(shape.cap, Tensor) and shape.cap.numel() > 1:
                shape = dataclasses.replace(shape, cap=shape.cap[keep])
            if source_keys is not None:
                source_keys = source_keys.filter(_arrow_mask(keep))
            lengths = torch.cat([lengths[:1], lengths[1:][keep]])
        cap, upper, weight = shape.parameters(raw.dtype)
        rows, a = narrow_index(index, b.shape[0]), None if cost is None else torch.as_tensor(cost).to(raw.dtype)
        minimum = None if at_least is None else torch.as_tensor(at_least, dtype=torch.bool).reshape(-1)
        if minimum is not None and minimum.shape != b.shape:
            raise ValueError(f"at_least: expected shape {tuple(b.shape)}, got {tuple(minimum.shape)}")
        if minimum is not None and bool(minimum.any()):
            b = torch.where(minimum, -b, b)
            a = torch.ones(rows.shape, dtype=raw.dtype) if a is None else a.reshape(rows.shape)
            a = torch.where(minimum[rows.long()], -a, a)
        data = BlockData(
            offsets=lengths,
            index=rows,
            cost=raw if minimize else -raw,
            coefficient=a,
            cap=cap,
            upper=upper,
            weight=weight,
            equality=shape.equality,
        )
        equal = torch.zeros(b.shape[0], dtype=torch.bool) if equality is None else torch.as_tensor(equality)
        problem = cls(
            data,
            b,
            equal.bool(),
            chunk_bounds(lengths, b.shape[0]),
            source_keys,
            destination_keys,
            skipped,
            resources=resources,
            at_least=None if minimum is None or not bool(minimum.any()) else minimum,
        )
        problem.check()
        problem._check_edges(allow_unused)
        return problem

    def check(self) -> None:
        """Refuse arrays that would make the kernels read outside of them, or that fit no problem.

        Raises:
            ValueError: If a shape or value does not fit.
            TypeError: If a dtype does not fit.
        """
        check_tensor("budgets", self.budgets, ndim=1, dtype=torch.float64, finite=True)
        check_tensor("equality", self.equality, shape=(self.rows,), dtype=torch.bool)
        check_tensor("bounds", self.bounds, ndim=1, dtype=torch.int64)
        if self.at_least is not None:
            check_tensor("at_least", self.at_least, shape=(self.rows,), dtype=torch.bool)
        self.data.check(self.rows)
        rising = self.bounds.numel() >= 2 and bool((self.bounds[1:] >= self.bounds[:-1]).all())
        if not rising or int(self.bounds[0]) != 0 or int(self.bounds[-1]) != self.data.blocks:
            raise ValueError(f"bounds: expected a rising sequence from 0 to {self.data.blocks}")
        if self.rows % max(1, len(self.resources)):
            raise ValueError(f"budgets: expected a multiple of {len(self.resources)} resources, got {self.rows}")
        for name, keys, count in (
            ("source_keys", self.source_keys, self.data.blocks),
            ("destination_keys", self.destination_keys, self.destinations),
        ):
            if keys is not None and len(keys) != count:
                raise ValueError(f"{name}: expected {count} keys, got {len(keys)}")

    @property
    def polytope(self) -> CappedBox:
        """The polytopes of the blocks."""
        d = self.data
        return CappedBox(d.cap, d.upper, d.weight, d.equality)

    @property
    def row_sign(self) -> Tensor:
        """-1 for rows that are held with the opposite sign (`at_least`), else 1; shape (rows,), float64."""
        ones = torch.ones(self.rows, dtype=torch.float64)
        return ones if self.at_least is None else torch.where(self.at_least, -ones, ones)

    @property
    def rows(self) -> int:
        """Number of coupling rows."""
        return self.budgets.shape[0]

    @property
    def destinations(self) -> int:
        """Number of destinations: rows, over the number of resources."""
        return self.rows // max(1, len(self.resources))

    @cached_property
    def nonnegative(self) -> bool:
        """Whether A and b are at least 0 and every row is `<=`, so that shrinking repairs a primal."""
        a = self.data.coefficient
        signs = a is None or a.numel() == 0 or bool(a.min() >= 0)
        return signs and bool((self.budgets >= 0).all()) and not bool(self.equality.any())

    def pieces(self, variables: int = 1 << 16) -> Iterator[tuple[int, int]]:
        """Contiguous runs of blocks with about so many variables each.

        Args:
            variables: Variables per run; a longer block is its own run.

        Yields:
            First block and the block after the last.
        """
        offsets, begin = self.data.offsets, 0
        while begin < self.data.blocks:
            end = int(torch.searchsorted(offsets, offsets[begin] + variables, right=True)) - 1
            end = min(max(end, begin + 1), self.data.blocks)
            yield begin, end
            begin = end

    def slice(self, begin: int, end: int) -> BlockData:
        """The data of a run of blocks, without a copy.

        Args:
            begin: First block.
            end: Block after the last.

        Returns:
            Views of the data.
        """
        d = self.data
        v = slice(int(d.offsets[begin] - d.offsets[0]), int(d.offsets[end] - d.offsets[0]))
        return BlockData(
            offsets=d.offsets[begin : end + 1],
            index=d.index[v],
            cost=d.cost[v],
            coefficient=None if d.coefficient is None else d.coefficient[v],
            cap=d.cap if d.cap.shape[0] == 1 else d.cap[begin:end],
            upper=d.upper if d.upper is None or d.upper.shape[0] == 1 else d.upper[v],
            weight=None if d.weight is None else d.weight[v],
            equality=d.equality,
        )

    def shard(self, rank: int, world_size: int) -> "MatchingProblem":
        """The blocks of one rank: whole chunks, so that sums do not depend on the number of ranks.

        Args:
            rank: This process.
            world_size: Number of processes; at most the number of chunks.

        Returns:
            The shard, with the offsets of the whole and views of its data.

        Raises:
            ValueError: If there are more ranks than chunks.
        """
        chunks = self.bounds.shape[0] - 1
        if world_size > chunks:
            raise ValueError(f"world_size: expected at most the {chunks} chunks of the problem, got {world_size}")
        low, high = rank * chunks // world_size, (rank + 1) * chunks // world_size
        begin, end = int(self.bounds[low]), int(self.bounds[high])
        shard = dataclasses.replace(
            self,
            data=self.slice(begin, end),
            bounds=self.bounds[low : high + 1] - begin,
            source_keys=None if self.source_keys is None else self.source_keys.slice(begin, end - begin),
            first_block=self.first_block + begin,
            sharded=True,
        )
        return shard if self.statistics is None else shard.with_statistics(self.statistics)

    def with_statistics(self, statistics: "Statistics") -> "MatchingProblem":
        """The same problem, of which it is known what `measure` finds.

        Args:
            statistics: Those of the whole problem.

        Returns:
            A copy with the same arrays.
        """
        copy = dataclasses.replace(self)
        object.__setattr__(copy, "statistics", statistics)
        return copy

    def limits(self, begin: int, end: int) -> Tensor:
        """Greatest value of each variable of a run of blocks, min(u, d / w).

        Args:
            begin: First block.
            end: Block after the last.

        Returns:
            Limits, shape (variables of the run,), float64.
        """
        part = self.slice(begin, end)
        return CappedBox(part.cap, part.upper, part.weight).limits(part.offsets - part.offsets[0])

    def _check_edges(self, allow_unused: bool) -> None:
        used = np.zeros(self.rows, dtype=bool)
        for begin, end in self.pieces():
            part = self.slice(begin, end)
            rows = part.index.reshape(part.variables, -1).numpy()
            used[rows.ravel()] = True
            lengths = (part.offsets[1:] - part.offsets[:-1]).numpy()
            duplicate = _first_duplicate(np.repeat(np.arange(end - begin), lengths), rows, self.rows)
            if duplicate is not None:
                block, row = duplicate
                raise ValueError(
                    f"edges: the edge from source {self.source_name(begin + block)} to destination "
                    f"{self.destination_name(row)} appears twice"
                )
        if not allow_unused and not used.all():
            missing = np.flatnonzero(~used)
            raise ValueError(
                f"budgets: {missing.size} without any edge, such as {self.destination_name(int(missing[0]))} "
                "(allow_unused accepts them)"
            )

    def source_name(self, block: int) -> Any:
        """What the user calls a block.

        Args:
            block: Number of the block within this problem or shard.

        Returns:
            The key.
        """
        return self.first_block + block if self.source_keys is None else self.source_keys[block].as_py()

    def destination_name(self, row: int) -> Any:
        """What the user calls a row.

        Args:
            row: Number of the row.

        Returns:
            The key, and the resource if there are several.
        """
        j = row % self.destinations
        name = j if self.destination_keys is None else self.destination_keys[j].as_py()
        return f"{name} ({self.resources[row // self.destinations]})" if self.resources else name


def narrow_index(index: ArrayLike | Tensor, rows: int) -> Tensor:
    """Row numbers as int32, refused when they do not fit.

    Args:
        index: Row numbers of any integer type.
        rows: Number of rows.

    Returns:
        The same numbers, int32.

    Raises:
        TypeError: If they are not integers.
        ValueError: If one is outside [0, rows).
    """
    raw = torch.as_tensor(index)
    if raw.is_floating_point() or raw.is_complex() or raw.dtype == torch.bool:
        raise TypeError(f"index: expected integers, got {raw.dtype}")
    if raw.numel() and not 0 <= int(raw.min()) <= int(raw.max()) < min(rows, 2**31):
        raise ValueError(f"index: expected destinations in [0, {rows}), got {int(raw.min())}..{int(raw.max())}")
    return raw.to(torch.int32)


def chunk_bounds(offsets: Tensor, rows: int) -> Tensor:
    """Blocks at which the chunks of the sums begin: about equal in variables, and fewer where there are many rows.

    Args:
        offsets: Bounds of the blocks, shape (blocks + 1,), int64.
        rows: Number of rows, which every chunk's sums span.

    Returns:
        Bounds, shape (chunks + 1,), int64, rising from 0 to the number of blocks.
    """
    variables, blocks = int(offsets[-1] - offsets[0]), offsets.shape[0] - 1
    chunks = max(1, min(CHUNKS, variables // (32 * rows + 1), blocks))
    targets = offsets[0] + torch.arange(1, chunks) * variables // chunks
    inner = torch.searchsorted(offsets, targets)
    return torch.cat([torch.tensor([0]), inner, torch.tensor([blocks])])


def _arrow_mask(keep: Tensor) -> Any:
    import pyarrow as pa

    return pa.array(keep.numpy())


def _first_duplicate(block: NDArray[Any], rows: NDArray[Any], m: int) -> tuple[int, int] | None:
    # First (block, row) of equal edges; sorted destinations are recognized without sorting.
    key = rows[:, 0].astype(np.int64)
    if rows.shape[1] > 1:  # edges are equal when all their rows are
        key = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
        m = rows.shape[0]
    same = block[1:] == block[:-1]
    if not (same & (key[1:] <= key[:-1])).any():
        return None
    order = np.argsort(block * np.int64(m) + key, kind="stable")
    equal = (block[order][1:] == block[order][:-1]) & (key[order][1:] == key[order][:-1])
    if not equal.any():
        return None
    at = order[np.flatnonzero(equal)[0]]
    return int(block[at]), int(rows[at, 0])
