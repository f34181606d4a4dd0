r"""The parity polytope, the hull of the 0-1 vectors with an even (or odd) number of ones, with an exact projection.

Of the exponentially many facets $\sum_{i \in F} (1 - x_i) + \sum_{i \notin F} x_i \ge 1$ (F of odd size for even
parity) at most one can be violated by a point of the cube: F holds the entries above 1/2, and if its size is even the
entry nearest 1/2 changes sides. Where it is violated, the projection is on that facet, which after $x_i \to 1 - x_i$
on F is the probability simplex.

Source: the oracle of arXiv 2103.05277 (sort and flip); the projection is that of Wasson and Draper (2015).
"""

import numpy as np
import torch
from core_tensor import project_blocks
from core_tensor.ops.project_blocks import reference
from torch import Tensor

from polytope_lp.polytopes.base import Array, Face, Polytope, face_with_cuts


class Parity(Polytope):
    """The hull of the 0-1 vectors with an even number of ones (odd if `odd`).

    Args:
        odd: Whether the number of ones is odd.
    """

    down_closed = False

    def __init__(self, *, odd: bool = False) -> None:
        self.odd = odd

    def check(self, offsets: Tensor) -> None:
        """See `Polytope.check`.

        Args:
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Raises:
            ValueError: If a block is empty and must have an odd sum.
        """
        empty = offsets[1:] == offsets[:-1]
        if self.odd and bool(empty.any()):
            raise ValueError(f"blocks: block {int(empty.nonzero()[0])} is empty, which is no odd number of ones")

    def best(self, direction: Array) -> Array:
        """See `Polytope.best`.

        Args:
            direction: Shape (n,), float64.

        Returns:
            The vertex, shape (n,), float64.
        """
        offsets = torch.tensor([0, direction.size])
        return self.minimizer(torch.from_numpy(-np.asarray(direction)), offsets).numpy()

    def minimizer(self, costs: Tensor, offsets: Tensor) -> Tensor:
        """See `Polytope.minimizer`: the negative costs, with the entry of least size flipped if their number is wrong.

        Args:
            costs: Costs r, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Vertices, shape (variables,), float64.
        """
        vertex = costs < 0
        return (vertex ^ self._flip(vertex, costs.abs(), offsets, self.odd)).double()

    def project(self, values: Tensor, offsets: Tensor) -> Tensor:
        """See `Polytope.project`.

        Args:
            values: Points, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Projections, shape (variables,), float64.
        """
        inside, facet, tight = self._facet(values, offsets)
        if not bool(tight.any()):
            return inside
        flipped = torch.where(facet, 1.0 - values, values)
        one = torch.ones(1, dtype=torch.float64)
        x = project_blocks(flipped, offsets, one, equality=True)
        return torch.where(tight[reference.block_of(offsets)], torch.where(facet, 1.0 - x, x), inside)

    def face(self, values: Tensor, x: Tensor, offsets: Tensor) -> Face:
        """See `Polytope.face`.

        Args:
            values: Points, shape (variables,), float64.
            x: Their projections, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            The face.
        """
        _, facet, tight = self._facet(values, offsets)
        free = (x > 0) & (x < 1)
        normal = torch.where(free & tight[reference.block_of(offsets)], torch.where(facet, -1.0, 1.0), 0.0)
        return face_with_cuts(free, normal, offsets)

    def limits(self, offsets: Tensor) -> Tensor:
        """See `Polytope.limits`.

        Args:
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Ones, shape (variables,), float64.
        """
        return torch.ones(int(offsets[-1]), dtype=torch.float64)

    def _facet(self, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The projection onto the cube, the only facet that it can violate, and the blocks in which it does.
        inside = values.clamp(0.0, 1.0)
        facet = inside > 0.5
        facet = facet ^ self._flip(facet, (inside - 0.5).abs(), offsets, not self.odd)
        distance = torch.where(facet, 1.0 - inside, inside)
        total = reference.sums(distance, reference.block_of(offsets), offsets.shape[0] - 1)
        return inside, facet, (total < 1.0) & (offsets[1:] > offsets[:-1])

    @staticmethod
    def _flip(chosen: Tensor, price: Tensor, offsets: Tensor, odd: bool) -> Tensor:
        # The entry of least price of every block whose number of chosen entries is of the wrong parity.
        block, blocks = reference.block_of(offsets), offsets.shape[0] - 1
        wrong = reference.sums(chosen.double(), block, blocks).long() % 2 != int(odd)
        order = torch.argsort(price, stable=True)
        order = order[torch.argsort(block[order], stable=True)]
        first = order[offsets[:-1][wrong & (offsets[1:] > offsets[:-1])]]
        flip = torch.zeros_like(chosen)
        flip[first] = True
        return flip
