"""Slots and slates: assignment of items to slots, and paths through a slate whose neighbors interact."""

from itertools import pairwise

import numpy as np
import scipy.optimize
import scipy.sparse
import torch
from core_tensor import project_assignment
from core_tensor.checks import check_number
from torch import Tensor

from polytope_lp.polytopes.corral import Corral
from polytope_lp.polytopes.oracle import Array, VertexPolytope
from polytope_lp.polytopes.rows import Rows, project_rows


class Assignment(VertexPolytope):
    r"""Items by slots, row by row: $\sum_i x_{ik} = 1$ (or <= 1) per slot, $\sum_k x_{ik} \le 1$ per item, $x \ge 0$.

    Also ranking: slots are positions. A block of n items has n * slots variables.

    Args:
        slots: Number of slots.
        filled: Whether every slot must be filled (then a block needs at least as many items).
    """

    def __init__(self, slots: int, *, filled: bool = True) -> None:
        super().__init__()
        check_number("slots", slots, low=1, integer=True)
        self.slots, self.filled = slots, filled
        self.down_closed = not filled
        self._found: tuple[Tensor, Tensor, Tensor] | None = None  # bounds of all blocks, weights and items of corrals

    def fresh(self) -> "Assignment":
        """See `Polytope.fresh`.

        Returns:
            A copy without corrals.
        """
        return Assignment(self.slots, filled=self.filled)

    def project(self, values: Tensor, offsets: Tensor) -> Tensor:
        """See `Polytope.project`: all blocks in one native call, by a QP where a corral grows too large.

        Args:
            values: Points, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Projections, shape (variables,), float64.
        """
        at = offsets.tolist()
        lengths = [high - low for low, high in pairwise(at)]
        limit = max(6, max(lengths, default=0) // 16)
        x, weights, items = project_assignment(values, offsets, self.slots, filled=self.filled, limit=limit)
        self._found = offsets, weights, items
        for i, first in enumerate(weights.numpy()[:, 0].tolist()):
            if first > 0 or lengths[i] == 0:
                continue
            rows = self._description(lengths[i])
            assert rows is not None  # every assignment has them
            block = slice(at[i] - at[0], at[i + 1] - at[0])
            self.switched += 1
            x[block] = torch.from_numpy(project_rows(values[block].detach().numpy(), rows))
        return x

    def _corral(self, i: int, n: int) -> Corral | None:
        if self._found is None or i >= len(self._found[1]):
            return None
        offsets, weights, items = self._found
        count = int((weights[i] > 0).sum())
        if not count or int(offsets[i + 1] - offsets[i]) != n:
            return None
        item = items[i, :count].numpy()
        vertex, slot = (item >= 0).nonzero()
        vertices = np.zeros((count, n))
        vertices[vertex, item[vertex, slot] * self.slots + slot] = 1.0
        return Corral(vertices, weights[i, :count].numpy(), 0)

    def check(self, offsets: Tensor) -> None:
        """See `Polytope.check`.

        Args:
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Raises:
            ValueError: If a block is no multiple of the slots, or has too few items to fill them.
        """
        lengths = offsets[1:] - offsets[:-1]
        wrong = (lengths % self.slots != 0) | (self.filled & (lengths < self.slots**2))
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            least = f"at least {self.slots} items" if self.filled else "whole items"
            raise ValueError(
                f"blocks: block {i} of {int(lengths[i])} variables does not hold {least} x {self.slots} slots"
            )

    def best(self, direction: Array) -> Array:
        """See `Polytope.best`: a linear sum assignment.

        Args:
            direction: Shape (items * slots,), float64.

        Returns:
            The vertex.
        """
        gain = direction.reshape(-1, self.slots)
        if not self.filled:
            gain = np.maximum(gain, 0.0)
        item, slot = scipy.optimize.linear_sum_assignment(gain, maximize=True)
        vertex = np.zeros(direction.size)
        vertex[item * self.slots + slot] = 1.0
        if not self.filled:
            vertex[gain.ravel() <= 0.0] = 0.0
        return vertex

    def rows(self, n: int) -> Rows:
        """See `VertexPolytope.rows`.

        Args:
            n: Length of the block.

        Returns:
            One row per slot, one per item.
        """
        items = n // self.slots
        slot = scipy.sparse.kron(np.ones((1, items)), scipy.sparse.eye_array(self.slots))
        item = scipy.sparse.kron(scipy.sparse.eye_array(items), np.ones((1, self.slots)))
        equation = np.arange(self.slots + items) < (self.slots if self.filled else 0)
        return Rows(scipy.sparse.csr_array(scipy.sparse.vstack([slot, item])), np.ones(self.slots + items), equation)


class Slate(VertexPolytope):
    r"""Paths through a slate: a start item, then for each next place an edge from item to item, one unit of flow.

    Variables: n first-place choices, then (places - 1) matrices of n x n transitions, in row-major order.

    Args:
        items: Number of items n.
        places: Places of the slate.
    """

    def __init__(self, items: int, places: int) -> None:
        super().__init__()
        check_number("items", items, low=1, integer=True)
        check_number("places", places, low=1, integer=True)
        self.items, self.places = items, places

    def best(self, direction: Array) -> Array:
        """See `Polytope.best`: a longest path by dynamic programming.

        Args:
            direction: Shape (n + (places - 1) n^2,), float64.

        Returns:
            The vertex.

        Raises:
            ValueError: If the block's length does not fit.
        """
        n, steps = self.items, self.places - 1
        if direction.size != n + steps * n * n:
            raise ValueError(f"blocks: expected length {n + steps * n * n}, got {direction.size}")
        gains = direction[n:].reshape(steps, n, n)
        onward, choice = np.zeros(n), []
        for gain in gains[::-1]:
            total = gain + onward
            choice.append(total.argmax(1))
            onward = total.max(1)
        vertex = np.zeros_like(direction)
        item = int((direction[:n] + onward).argmax())
        vertex[item] = 1.0
        for place, pick in enumerate(reversed(choice)):
            vertex[n + place * n * n + item * n + int(pick[item])] = 1.0
            item = int(pick[item])
        return vertex

    def rows(self, n: int) -> Rows:
        """See `VertexPolytope.rows`: one unit enters, and what enters an item leaves it.

        Args:
            n: Length of the block.

        Returns:
            One equation for the first place, one per item of every place but the last.
        """
        k, places = self.items, self.places
        first = scipy.sparse.csr_array((np.ones(k), (np.zeros(k, np.int64), np.arange(k))), shape=(1, n))
        if places == 1:
            return Rows(first, np.ones(1), np.array([True]))
        leave = scipy.sparse.kron(scipy.sparse.eye_array(k), np.ones((1, k)))
        enter = scipy.sparse.kron(np.ones((1, k)), scipy.sparse.eye_array(k))
        flow = []
        for place in range(places - 1):
            into = scipy.sparse.eye_array(k) if place == 0 else enter
            empty = [scipy.sparse.csr_array((k, k if p < 0 else k * k)) for p in range(-1, places - 1)]
            blocks = [*empty[:place], into, -leave, *empty[place + 2 :]]
            flow.append(scipy.sparse.hstack(blocks))
        G = scipy.sparse.csr_array(scipy.sparse.vstack([first, *flow]))
        return Rows(G, np.append(1.0, np.zeros(G.shape[0] - 1)), np.ones(G.shape[0], dtype=bool))
