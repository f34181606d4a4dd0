r"""Rankings by exposure: the permutahedron of position discounts, with an exact projection by isotonic regression.

An item shown at position k is seen with weight $w_k$ ($w_1 \ge w_2 \ge \dots \ge 0$, zero below the last position).
The hull of the exposures of all rankings is the permutahedron of w,

$$ C = \{x : \textstyle\sum_{i \in S} x_i \le \sum_{k \le |S|} w_k \text{ for all } S, \; 1'x = 1'w\}, $$

or, where positions may stay empty, its down-closure in $x \ge 0$ (then $1'x \le 1'w$). It has n variables where slots
have $nK$, its best vertex is a sort, and its projection is $x = v - \mathrm{iso}(v - w)$ in the order of v.

Source: the separable slots of arXiv 2103.05277 (value times discount, oracle by sorting); projection: Blondel et al.
(2020), Lim and Wright (2016).
"""

from itertools import pairwise

import numpy as np
import scipy.optimize
import scipy.sparse
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from polytope_lp.polytopes.base import Array, Face, Polytope, each_block


class Ranking(Polytope):
    """Exposures of the rankings of a block's items.

    Args:
        discounts: Weight of every position, falling and not negative, shape (positions,); such as 1 / log2(1 + k).
        filled: Whether every position must be filled (then a block needs at least as many items).
    """

    def __init__(self, discounts: ArrayLike, *, filled: bool = False) -> None:
        self.discounts, self.filled = np.array(discounts, dtype=np.float64).reshape(-1), filled
        w = self.discounts
        if not w.size or not np.isfinite(w).all() or w[-1] < 0 or (np.diff(w) > 0).any():
            raise ValueError(f"discounts: expected falling finite values of at least 0, got {w}")
        self.down_closed = not filled

    def check(self, offsets: Tensor) -> None:
        """See `Polytope.check`.

        Args:
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Raises:
            ValueError: If a block has too few items to fill the positions.
        """
        short = (offsets[1:] - offsets[:-1]) < self.discounts.size
        if self.filled and bool(short.any()):
            i = int(short.nonzero()[0])
            raise ValueError(f"blocks: block {i} has fewer items than the {self.discounts.size} positions to fill")

    def _weights(self, n: int) -> Array:
        w = np.zeros(n)
        w[: self.discounts.size] = self.discounts[:n]
        return w

    def best(self, direction: Array) -> Array:
        """A vertex that maximizes `direction'v` over one block: items sorted by falling value.

        Args:
            direction: Shape (n,), float64.

        Returns:
            The vertex, shape (n,), float64.
        """
        vertex = np.zeros(direction.size)
        vertex[np.argsort(-direction, kind="stable")] = self._weights(direction.size)
        return vertex if self.filled else np.where(direction > 0, vertex, 0.0)

    def _groups(self, y: Array) -> tuple[Array, NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        # The projection of one block; the order of its items, where groups of equal excess begin, and which are tight.
        if not self.filled:
            y = np.maximum(y, 0.0)
        order, w = np.argsort(-y, kind="stable"), self._weights(y.size)
        falling = y[order]
        begins = scipy.optimize.isotonic_regression(falling - w, increasing=False).blocks
        sizes, first = np.diff(begins), begins[:-1]
        group = np.repeat(np.arange(sizes.size), sizes)
        # Differences within a group are small beside y: taken first, they keep the digits that y - excess would lose.
        inner = falling - falling[first][group]
        mean = np.add.reduceat(w - inner, first) / sizes
        excess = falling[first] - mean
        tight = self.filled | (excess > 0)
        x = np.empty_like(y)
        x[order] = np.where(tight[group], np.maximum(inner + mean[group], 0.0), falling)
        return x, order, begins, tight

    def project(self, values: Tensor, offsets: Tensor) -> Tensor:
        """See `Polytope.project`.

        Args:
            values: Points, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Projections, shape (variables,), float64.
        """
        return each_block(lambda y: self._groups(y)[0], values, offsets)

    def face(self, values: Tensor, x: Tensor, offsets: Tensor) -> Face:
        """See `Polytope.face`: within a group of equal excess the sum stays.

        Args:
            values: Points, shape (variables,), float64.
            x: Their projections, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            The face.
        """
        v, free = values.numpy(), np.zeros(x.shape[0], dtype=bool)
        at: list[NDArray[np.int64]] = []
        for low, high in pairwise(offsets.tolist()):
            if high == low:
                continue
            _, order, begins, tight = self._groups(v[low:high])
            free[low:high] = self.filled | (v[low:high] > 0)
            for bound, (first, last) in zip(tight, pairwise(begins.tolist()), strict=True):
                if bound:
                    mine = low + order[first:last]
                    at.append(mine[free[mine]])
        at = [mine for mine in at if mine.size]
        column = np.repeat(np.arange(len(at)), [mine.size for mine in at])
        entry = np.concatenate([np.full(mine.size, mine.size**-0.5) for mine in at] or [np.zeros(0)])
        row = np.concatenate([*at, np.zeros(0, np.int64)])
        return Face(free, scipy.sparse.csc_array((entry, (row, column)), shape=(x.shape[0], len(at))))

    def limits(self, offsets: Tensor) -> Tensor:
        """See `Polytope.limits`.

        Args:
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            The first position's weight, shape (variables,), float64.
        """
        return torch.full((int(offsets[-1]),), float(self.discounts[0]), dtype=torch.float64)
