r"""Capped boxes $\{0 \le x \le u, w'x \le d\}$: box, simplex, box-cut and knapsack, with exact native projections."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from core_tensor import project_blocks
from core_tensor.ops.project_blocks import check_family, reference
from torch import Tensor

from polytope_lp.polytopes.base import Array, Face, Polytope, face_with_cuts

Values = float | Tensor
"""A number for all blocks (or variables), or one per block (or variable)."""


@dataclass(frozen=True, eq=False)
class CappedBox(Polytope):
    r"""$C_i = \{0 \le x \le u, \; w'x \le d_i\}$, or $w'x = d_i$.

    Attributes:
        cap: Right-hand side d: one number, or shape (blocks,); infinite for a plain box.
        upper: Upper bounds u: one number, shape (variables,), or None for no bound.
        weight: Positive weights w, shape (variables,), or None for ones.
        equality: Whether the cut is an equation.
    """

    cap: Values = 1.0
    upper: Values | None = None
    weight: Tensor | None = None
    equality: bool = False

    @property
    def down_closed(self) -> bool:  # type: ignore[override]
        """Whether shrinking a point keeps it inside: unless the cut is an equation."""
        return not self.equality

    def parameters(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The parameters as the kernels take them.

        Args:
            dtype: Dtype of the bounds and weights.

        Returns:
            `cap` of shape (blocks,) or (1,) in float64, `upper` of shape (variables,) or (1,), and `weight`.
        """
        upper = None if self.upper is None else torch.as_tensor(self.upper, dtype=dtype).reshape(-1)
        weight = None if self.weight is None else self.weight.to(dtype)
        return torch.as_tensor(self.cap, dtype=torch.float64).reshape(-1), upper, weight

    def check(self, offsets: Tensor) -> None:
        """See `Polytope.check`.

        Args:
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Raises:
            ValueError: If a parameter has the wrong length or sign, or a block is not compact or empty of points.
        """
        cap, upper, weight = self.parameters()
        check_family(int(offsets[-1]), offsets, cap, upper, weight, self.equality, torch.float64)
        if not bool(torch.isfinite(self.limits(offsets)).all()):
            raise ValueError("polytope: expected compact blocks, got neither a finite cap nor finite upper bounds")

    def project(self, values: Tensor, offsets: Tensor) -> Tensor:
        """See `Polytope.project`.

        Args:
            values: Points, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Projections, shape (variables,), float64.
        """
        cap, upper, weight = self.parameters()
        return project_blocks(values, offsets, cap, upper, weight, equality=self.equality)

    def best(self, direction: Array) -> Array:
        """See `Polytope.best`: of the only block, or of one that shares all parameters.

        Args:
            direction: Shape (n,), float64.

        Returns:
            The vertex.
        """
        costs = torch.from_numpy(-np.asarray(direction, dtype=np.float64))
        return self.minimizer(costs, torch.tensor([0, costs.shape[0]])).numpy()

    def minimizer(self, costs: Tensor, offsets: Tensor) -> Tensor:
        """See `Polytope.minimizer`.

        Args:
            costs: Costs r, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Vertices, shape (variables,), float64.
        """
        return reference.minimiser(costs, offsets, *self.parameters(), self.equality)

    def limits(self, offsets: Tensor) -> Tensor:
        """See `Polytope.limits`.

        Args:
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            Limits, shape (variables,), float64.
        """
        return reference.bounds(int(offsets[-1]), offsets, *self.parameters())[2]

    def face(self, values: Tensor, x: Tensor, offsets: Tensor) -> Face:  # noqa: ARG002
        """See `Polytope.face`: entries strictly between their bounds, and one normalized column per tight cut.

        Args:
            values: Points, shape (variables,), float64.
            x: Their projections, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            The face.
        """
        cap, upper, weight = self.parameters()
        block, blocks = reference.block_of(offsets), offsets.shape[0] - 1
        w = torch.ones_like(x) if weight is None else weight
        own = torch.full_like(x, torch.inf) if upper is None else upper.expand(x.shape[0])
        free = (x > 0) & (x < own)
        tight = (reference.sums(w * x, block, blocks) >= cap.expand(blocks) * (1 - 1e-12)) | self.equality
        return face_with_cuts(free, torch.where(free & tight[block], w, 0.0), offsets)

    def tangent(self, direction: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        """An element of the generalized Jacobian of the projection at its value x, times a direction.

        Args:
            direction: Direction, shape (variables,), float64.
            x: A value of `project`, shape (variables,), float64.
            offsets: Bounds of the blocks, shape (blocks + 1,), int64.

        Returns:
            The product, shape (variables,), float64.
        """
        return reference.tangent(direction, x, offsets, *self.parameters(), self.equality)

    def describe(self) -> dict[str, Any]:
        """The polytope as JSON, for problems whose bounds do not vary.

        Returns:
            `{"cap": ..., "upper": ..., "equality": ...}`; values that vary become `"column"`.
        """

        def plain(value: Values | None) -> Any:
            return "column" if isinstance(value, Tensor) and value.numel() != 1 else value and float(value)

        return {
            "cap": plain(self.cap),
            "upper": plain(self.upper),
            "weight": plain(self.weight),
            "equality": self.equality,
        }


def box(upper: Values = 1.0) -> CappedBox:
    r"""$\{0 \le x \le u\}$.

    Args:
        upper: Upper bounds: one number or shape (variables,).

    Returns:
        The polytope.
    """
    return CappedBox(cap=torch.inf, upper=upper)


def simplex(cap: Values = 1.0, *, equality: bool = False) -> CappedBox:
    r"""$\{x \ge 0, \; 1'x \le z\}$ or $1'x = z$.

    Args:
        cap: Right-hand side z: one number or shape (blocks,).
        equality: Whether the sum is z exactly.

    Returns:
        The polytope.
    """
    return CappedBox(cap=cap, equality=equality)


def box_cut(cap: Values, upper: Values = 1.0, *, equality: bool = False) -> CappedBox:
    r"""$\{0 \le x \le u, \; 1'x \le d\}$ or $1'x = d$, for real d and u.

    Args:
        cap: Right-hand side d: one number or shape (blocks,).
        upper: Upper bounds: one number or shape (variables,).
        equality: Whether the sum is d exactly.

    Returns:
        The polytope.
    """
    return CappedBox(cap=cap, upper=upper, equality=equality)


def knapsack(cap: Values, weight: Tensor, upper: Values | None = 1.0, *, equality: bool = False) -> CappedBox:
    r"""$\{0 \le x \le u, \; w'x \le d\}$ or $w'x = d$.

    Args:
        cap: Right-hand side d: one number or shape (blocks,).
        weight: Positive weights w, shape (variables,).
        upper: Upper bounds: one number, shape (variables,), or None.
        equality: Whether the weighted sum is d exactly.

    Returns:
        The polytope.
    """
    return CappedBox(cap=cap, upper=upper, weight=weight, equality=equality)
