"""Any polytope that can name a best vertex: a list of vertices, or the user's own function."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from polytope_lp.polytopes import corral
from polytope_lp.polytopes.base import Array, Face, Polytope
from polytope_lp.polytopes.rows import Rows, project_rows

SAME = 1e-12
"""Points of a polytope that differ by less in every entry have the same corral."""


class VertexPolytope(Polytope):
    """A polytope given by a vertex oracle; projection by the corral, or by a QP where the corral grows too large.

    Corrals are kept between calls: near the end of a solve most do not change.
    """

    down_closed = False

    def __init__(self) -> None:
        self._kept: dict[int, corral.Corral] = {}
        self._rows: dict[int, Rows | None] = {}
        self.switched = 0

    def fresh(self) -> "VertexPolytope":
        """See `Polytope.fresh`.

        Returns:
            A copy without corrals.
        """
        other = copy.copy(self)
        VertexPolytope.__init__(other)
        return other

    def rows(self, n: int) -> Rows | None:  # noqa: ARG002
        r"""The block as inequalities over $x \ge 0$, if it has a short description.

        Args:
            n: Length of the block.

        Returns:
            The rows; None if there is no short description.
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
        found = corral.project(y, self.best, warm, limit=max(6, y.size // 16))
        if found.complete or self._description(y.size) is not None:
            return found
        return corral.project(y, self.best, found.vertices)

    def _description(self, n: int) -> Rows | None:
        # Made when a corral first outgrows its limit: at a small gamma none ever does.
        if n not in self._rows:
            self._rows[n] = self.rows(n)
        return self._rows[n]

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
        for i, (low, high) in enumerate(pairwise(at)):
            if high > low:
                x[low:high] = self._project(i, v[low:high])
        return torch.from_numpy(x)

    def _corral(self, i: int, n: int) -> corral.Corral | None:
        """The corral of a block's last projection; None if it is not known, or of a block of another length."""
        kept = self._kept.get(i)
        return kept if kept is not None and kept.vertices.shape[1] == n else None

    def _project(self, i: int, y: Array) -> Array:
        kept = self._corral(i, y.size)
        found = self.project_block(y, None if kept is None else kept.vertices)
        rows = None if found.complete else self._description(y.size)
        if rows is not None:
            self.switched += 1
            self._kept.pop(i, None)
            return project_rows(y, rows)
        if not found.complete:
            raise RuntimeError(f"polytope: the projection of block {i} did not end; is the oracle a maximizer?")
        self._kept[i] = found
        return found.point

    def face(self, values: Tensor, x: Tensor, offsets: Tensor) -> Face:
        """See `Polytope.face`: the directions between the vertices of each corral.

        Args:
            values: Points, shape (variables,), float64.
            x: Their projections, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            The face.
        """
        at, free = offsets.tolist(), np.zeros(x.shape[0], dtype=bool)
        cuts, spans = [], []
        for i, (low, high) in enumerate(pairwise(at)):
            mine, n = x[low:high].numpy(), high - low
            kept = self._corral(i, n)
            if n and (kept is None or np.abs(kept.point - mine).max() > SAME):
                self._project(i, values[low:high].numpy())
                kept = self._kept.get(i)
            basis, normals = np.zeros((n, 0)), np.zeros((n, 0))
            if n and kept is not None:
                basis = np.linalg.qr((kept.vertices[1:] - kept.vertices[0]).T)[0]
            elif n and (rows := self._description(n)) is not None:
                free[low:high], normals = rows.face(mine)
            cuts.append(normals)
            spans.append(basis)
        U, Q = (scipy.sparse.csc_array(scipy.sparse.block_diag(parts, format="csc")) for parts in (cuts, spans))
        return Face(free, U, Q)

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
        oracle: Given a direction of shape (n,), a vertex of shape (n,) that maximizes the inner product.
    """

    def __init__(self, oracle: Callable[[Array], Any]) -> None:
        super().__init__()
        self._oracle = oracle

    def best(self, direction: Array) -> Array:
        """See `Polytope.best`.

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
        """See `Polytope.best`.

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
