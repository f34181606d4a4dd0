r"""Any polytope that can name a best vertex: assignment, slates, parity, a list of vertices, or the user's own."""

from abc import abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse
import torch
from core_tensor.checks import check_number
from numpy.typing import NDArray
from torch import Tensor

from polytope_lp import corral
from polytope_lp.polytopes.base import Polytope

Array = NDArray[np.float64]
Rows = tuple[scipy.sparse.csr_array, Array, NDArray[np.bool_]]
"""Matrix G, right-hand sides h and which rows are equations, of $\\{x \\ge 0, Gx \\le h\\}$."""


class VertexPolytope(Polytope):
    """A polytope given by a vertex oracle; projection by the corral, or by a QP where the corral grows too large.

    Corrals are kept between calls: near the end of a solve most do not change.
    """

    down_closed = False

    def __init__(self) -> None:
        self._warm: dict[int, Array] = {}
        self._rows: dict[int, Rows | None] = {}
        self.switched = 0

    @abstractmethod
    def best(self, direction: Array) -> Array:
        """A vertex that maximises `direction'v` over one block.

        Args:
            direction: Shape (n,), float64.

        Returns:
            The vertex, shape (n,), float64.
        """

    def rows(self, n: int) -> Rows | None:  # noqa: ARG002
        r"""The block as inequalities over $x \ge 0$, if it has a short description.

        Args:
            n: Length of the block.

        Returns:
            Matrix, right-hand sides and which rows are equations; None if there is no short description.
        """
        return None

    def check(self, offsets: Tensor) -> None:
        """See `Polytope.check`.

        Args:
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Raises:
            ValueError: If the oracle's vertices do not fit a block.
        """
        for n in sorted(set((offsets[1:] - offsets[:-1]).tolist())):
            if n and self.best(np.zeros(n)).shape != (n,):
                raise ValueError(f"polytope: its oracle returned {self.best(np.zeros(n)).shape} for a block of {n}")

    def project_block(self, y: Array, warm: Array | None = None) -> corral.Corral:
        """Project one block, by the corral alone.

        Args:
            y: Point, shape (n,).
            warm: Vertices to start from.

        Returns:
            The corral of the projection; incomplete when it outgrew n and the block has a description for a QP.
        """
        if y.size not in self._rows:
            self._rows[y.size] = self.rows(y.size)
        return corral.project(y, self.best, warm, limit=None if self._rows[y.size] is None else max(6, y.size // 16))

    def project(self, values: Tensor, offsets: Tensor) -> Tensor:
        """See `Polytope.project`.

        Args:
            values: Points, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Projections, shape (variables,), float64.
        """
        v, at = values.detach().numpy(), offsets.tolist()
        x = np.zeros_like(v)
        for i in range(len(at) - 1):
            y = v[at[i] : at[i + 1]]
            if not y.size:
                continue
            warm = self._warm.get(i)
            found = self.project_block(y, warm if warm is not None and warm.shape[1] == y.size else None)
            self._warm[i] = found.vertices
            rows = None if found.complete else self._rows[y.size]
            if rows is not None:
                self.switched += 1
                del self._warm[i]
            x[at[i] : at[i + 1]] = found.point if rows is None else project_rows(y, *rows)
        return torch.from_numpy(x)

    def minimiser(self, costs: Tensor, offsets: Tensor) -> Tensor:
        """See `Polytope.minimiser`.

        Args:
            costs: Costs r, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Vertices, shape (variables,), float64.
        """
        r, at = costs.detach().numpy(), offsets.tolist()
        parts = [self.best(-r[low:high]) for low, high in pairwise(at) if high > low]
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0))

    def limits(self, offsets: Tensor) -> Tensor:
        """See `Polytope.limits`.

        Args:
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            The greatest entry that the oracle reaches by itself, shape (variables,), float64.
        """
        parts, known = [np.zeros(0)], {}
        for n in (offsets[1:] - offsets[:-1]).tolist():
            if n not in known:
                eye = np.eye(n)
                known[n] = np.array([max(abs(self.best(e) @ e), abs(self.best(-e) @ e)) for e in eye])
            parts.append(known[n])
        return torch.from_numpy(np.concatenate(parts))


class OraclePolytope(VertexPolytope):
    """The hull of whatever vertices a user's function names.

    Args:
        oracle: Given a direction of shape (n,), a vertex of shape (n,) that maximises the inner product.
    """

    def __init__(self, oracle: Callable[[Array], Any]) -> None:
        super().__init__()
        self._oracle = oracle

    def best(self, direction: Array) -> Array:
        """See `VertexPolytope.best`.

        Args:
            direction: Shape (n,), float64.

        Returns:
            The vertex.
        """
        return np.asarray(self._oracle(direction), dtype=np.float64)


class VertexList(VertexPolytope):
    """The hull of listed vertices, the same for every block.

    Args:
        vertices: Shape (k, n).
    """

    def __init__(self, vertices: Any) -> None:
        super().__init__()
        self.vertices = np.array(vertices, dtype=np.float64)
        if self.vertices.ndim != 2 or not self.vertices.size or not np.isfinite(self.vertices).all():
            raise ValueError(f"vertices: expected a finite (k, n) array, got shape {self.vertices.shape}")

    def best(self, direction: Array) -> Array:
        """See `VertexPolytope.best`.

        Args:
            direction: Shape (n,), float64.

        Returns:
            The vertex.

        Raises:
            ValueError: If a block is not as long as the vertices.
        """
        if direction.size != self.vertices.shape[1]:
            raise ValueError(f"blocks: expected length {self.vertices.shape[1]}, got {direction.size}")
        return np.asarray(self.vertices[int(np.argmax(self.vertices @ direction))])


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
        """See `VertexPolytope.best`: a linear sum assignment.

        Args:
            direction: Shape (items * slots,), float64.

        Returns:
            The vertex.
        """
        gain = direction.reshape(-1, self.slots)
        if not self.filled:
            gain = np.maximum(gain, 0.0)
        item, slot = scipy.optimize.linear_sum_assignment(gain, maximize=True)
        vertex = np.zeros_like(gain)
        vertex[item, slot] = 1.0
        if not self.filled:
            vertex[gain <= 0.0] = 0.0
        return vertex.ravel()

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
        return scipy.sparse.csr_array(scipy.sparse.vstack([slot, item])), np.ones(self.slots + items), equation


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
        """See `VertexPolytope.best`: a longest path by dynamic programming.

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


class Parity(VertexPolytope):
    """The hull of the 0-1 vectors with an even number of ones (odd if `odd`).

    Args:
        odd: Whether the number of ones is odd.
    """

    def __init__(self, *, odd: bool = False) -> None:
        super().__init__()
        self.odd = odd

    def best(self, direction: Array) -> Array:
        """See `VertexPolytope.best`: the positive entries, with the cheapest one flipped if their number is wrong.

        Args:
            direction: Shape (n,), float64.

        Returns:
            The vertex.
        """
        vertex = (direction > 0).astype(np.float64)
        if int(vertex.sum()) % 2 != int(self.odd):
            flip = int(np.abs(direction).argmin())
            vertex[flip] = 1.0 - vertex[flip]
        return vertex


def project_rows(
    y: Array, G: scipy.sparse.csr_array, h: Array, equation: NDArray[np.bool_], tol: float = 1e-13
) -> Array:
    r"""Project onto $\{x \ge 0, Gx \le h\}$ (equations where said) through its dual, a small smooth concave problem.

    Args:
        y: Point, shape (n,).
        G: Rows, shape (m, n).
        h: Right-hand sides, shape (m,).
        equation: Which rows are equations, shape (m,).
        tol: Decrease of the dual, relative to the size of the point, at which to stop.

    Returns:
        The projection, shape (n,).
    """
    dense, scale = G.toarray(), 1.0 + float(np.abs(y).max(initial=0.0))
    mu = np.zeros(h.size)

    def at(mu: Array) -> tuple[float, Array]:
        x = np.maximum(y - mu @ dense, 0.0)
        return 0.5 * float(x @ x) + float(mu @ h), x

    value, x = at(mu)
    for _ in range(200):  # semismooth Newton on the coordinates that are not held at zero
        gradient = h - dense @ x
        moving = equation | (mu > 0) | (gradient < 0)
        if float(np.abs(gradient[moving]).max(initial=0.0)) <= tol * scale:
            break
        B = dense[np.ix_(moving, x > 0)]
        hessian = B @ B.T
        hessian.flat[:: hessian.shape[0] + 1] += 1e-10
        direction = np.zeros_like(mu)
        direction[moving] = -np.linalg.solve(hessian, gradient[moving])
        t = 1.0
        while True:
            trial = mu + t * direction
            trial = np.where(equation, trial, np.maximum(trial, 0.0))
            then, reached = at(trial)
            if then <= value + 1e-4 * float(gradient @ (trial - mu)) or t < 1e-12:
                break
            t /= 2
        if t < 1e-12:
            break
        mu, value, x = trial, then, reached
    return x
