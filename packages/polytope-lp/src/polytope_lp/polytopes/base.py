"""What a solver needs to know about a family of block polytopes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.sparse
import torch
from core_tensor.ops.project_blocks import reference
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Face:
    """An element of the generalized Jacobian of a projection, P = diag(free) - U U' + Q Q'.

    Attributes:
        free: Entries that move freely, shape (n,), bool.
        cuts: U, orthonormal columns supported on free entries, one per tight cut; shape (n, cuts), or None.
        spans: Q, orthonormal columns supported off the free entries, which span the directions inside the face of
            blocks that are known by vertices; shape (n, spans), or None.
    """

    free: NDArray[np.bool_]
    cuts: scipy.sparse.csc_array | None = None
    spans: scipy.sparse.csc_array | None = None

    def apply(self, direction: NDArray[np.float64]) -> NDArray[np.float64]:
        """P times a direction.

        Args:
            direction: Shape (n,).

        Returns:
            Shape (n,).
        """
        product = np.where(self.free, direction, 0.0)
        for columns, sign in ((self.cuts, -1.0), (self.spans, 1.0)):
            if columns is not None:
                product = product + sign * (columns @ (columns.T @ direction))
        return product


class Polytope(ABC):
    r"""A family of compact polytopes $C_i$, one per block of a ragged vector.

    Attributes:
        down_closed: Whether $0 \le y \le x \in C_i$ implies $y \in C_i$, so that shrinking
            repairs a primal.
    """

    down_closed: bool

    @abstractmethod
    def check(self, offsets: Tensor) -> None:
        """Refuse blocks that the polytope does not fit.

        Args:
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Raises:
            ValueError: If a block is too short, too long, or empty of points.
        """

    @abstractmethod
    def project(self, values: Tensor, offsets: Tensor) -> Tensor:
        r"""Euclidean projection of every block, $\min_{x_i \in C_i} \lVert x_i - v_i \rVert^2$.

        Args:
            values: Points, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Projections, shape (variables,), float64.
        """

    @abstractmethod
    def best(self, direction: Array) -> Array:
        """A vertex that maximizes `direction'v` over one block.

        Args:
            direction: Shape (n,), float64.

        Returns:
            The vertex, shape (n,), float64.
        """

    def minimizer(self, costs: Tensor, offsets: Tensor) -> Tensor:
        r"""A vertex of least cost in every block, $\arg\min_{x_i \in C_i} r_i'x_i$.

        Args:
            costs: Costs r, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Vertices, shape (variables,), float64.
        """
        return each_block(lambda r: self.best(-r), costs, offsets)

    @abstractmethod
    def limits(self, offsets: Tensor) -> Tensor:
        """Greatest absolute value that each variable can take.

        Args:
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Limits, shape (variables,), float64.
        """

    @abstractmethod
    def face(self, values: Tensor, x: Tensor, offsets: Tensor) -> Face:
        """The face of each block that a projection is on.

        Args:
            values: Points, shape (variables,), float64.
            x: Their projections, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            The generalized Jacobian of the projection there.
        """

    def fresh(self) -> "Polytope":
        """The same polytope for another use: without what earlier projections left behind.

        Returns:
            Itself where nothing is kept.
        """
        return self


def each_block(function: Callable[[Array], Array], values: Tensor, offsets: Tensor) -> Tensor:
    """A function of one block, applied to every block that is not empty.

    Args:
        function: From shape (n,) to shape (n,), float64.
        values: Shape (variables,), float64.
        offsets: Bounds of the blocks, shape (blocks + 1,), int64.

    Returns:
        What it gives, shape (variables,), float64.
    """
    v = values.detach().numpy()
    parts = [function(v[low:high]) for low, high in pairwise(offsets.tolist()) if high > low]
    return torch.from_numpy(np.concatenate([*parts, np.zeros(0)]))


def face_with_cuts(free: Tensor, normal: Tensor, offsets: Tensor) -> Face:
    """The face of blocks with at most one active cut each.

    Args:
        free: Entries that move freely, shape (variables,), bool.
        normal: Normals of the tight cuts, zero off the free entries and in blocks without one, shape (variables,).
        offsets: Bounds of the blocks, shape (blocks + 1,), int64.

    Returns:
        The generalized Jacobian, with a unit column per tight cut.
    """
    block, blocks = reference.block_of(offsets), offsets.shape[0] - 1
    size = reference.sums(normal.square(), block, blocks).sqrt()
    kept = torch.nonzero(normal).ravel()
    entries = (normal / size.clamp_min(1e-300)[block])[kept].numpy()
    at = (kept.numpy(), block[kept].numpy())
    columns = scipy.sparse.csc_array((entries, at), shape=(normal.shape[0], blocks))
    return Face(free.numpy(), columns[:, np.flatnonzero(size.numpy() > 0)])
