r"""One evaluation of the ridge-smoothed dual of a block-separable LP, fused into a single read of the data.

$$ g_\gamma(\lambda) = \min_{x_i \in C_i} c'x + \tfrac{\gamma}{2} \lVert x - p \rVert^2 + \lambda'(A x - b), \qquad
x_i(\lambda) = \mathrm{Proj}_{C_i}\bigl(p_i - (c_i + A_i'\lambda) / \gamma\bigr), \qquad \nabla g_\gamma = A x - b. $$

The polytopes are the capped boxes of `project_blocks`. Reduced costs are formed and projected in float64, unscaled;
data may be stored in float32. Sums are taken in float64 inside fixed chunks of blocks and then added as 64-bit
fixed-point numbers, $\sum_c \mathrm{round}(s \, \mathrm{sum}_c)$: an addition that has no order, so threads and ranks
cannot change a result. Source: arXiv 2103.05277, the dual decomposition and its projections.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core_tensor.checks import check_flag, check_indices, check_number, check_offsets, check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.dual_pass import cpu, reference
from core_tensor.ops.project_blocks import check_family

TOTALS = ("cost", "square", "least", "fractional", "nonzero")
"""What follows the rows in `dual_pass`'s sums: c'x, ||x - p||^2, sum of min r'v, and two counts."""


_VARIABLES = 1 << 48
"""More variables than any memory holds; multiples of a position up to here fit 64 bits."""


def _fake(
    offsets: Tensor,
    index: Tensor,
    cost: Tensor,
    coefficient: Tensor | None,
    lam: Tensor,
    gamma: float,
    cap: Tensor,
    upper: Tensor | None,
    weight: Tensor | None,
    equality: bool,
    anchor: Tensor | None,
    shrink: Tensor | None,
    scale: Tensor,
    bounds: Tensor,
    primal: bool,
) -> tuple[Tensor, Tensor]:
    x = lam.new_empty(cost.shape[0] if primal else 0)
    return torch.empty_like(scale, dtype=torch.int64), x


_pass = operator(
    "dual_pass(Tensor offsets, Tensor index, Tensor cost, Tensor? coefficient, Tensor lam, float gamma, Tensor cap, "
    "Tensor? upper, Tensor? weight, bool equality, Tensor? anchor, Tensor? shrink, Tensor scale, Tensor bounds, "
    "bool primal) -> (Tensor, Tensor)",
    reference=reference.dual_pass,
    fake=_fake,
    cpu=cpu.dual_pass,
    cuda="core_tensor.ops.dual_pass.triton:dual_pass",
)


@dataclass(frozen=True)
class BlockData:
    r"""The data of a block-separable LP, or of a contiguous run of its blocks.

    Attributes:
        offsets: Bounds of the blocks, shape (blocks + 1,), int64. A run of blocks keeps the offsets of the whole.
        index: Rows of A in which each variable appears, shape (variables,) or (variables, rows per variable), int32.
        cost: Costs c, shape (variables,), float32 or float64.
        coefficient: Entries of A, shape and order of `index`, dtype of `cost`; None for ones.
        cap: Right-hand sides of the blocks' cuts, shape (blocks,) or (1,), float64.
        upper: Upper bounds of the variables, shape (variables,) or (1,), dtype of `cost`; None for none.
        weight: Weights of the cuts, shape (variables,), dtype of `cost`; None for ones.
        equality: Whether the cuts are equations.
    """

    offsets: Tensor
    index: Tensor
    cost: Tensor
    coefficient: Tensor | None
    cap: Tensor
    upper: Tensor | None = None
    weight: Tensor | None = None
    equality: bool = False

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.offsets.shape[0] - 1

    @property
    def variables(self) -> int:
        """Number of variables."""
        return self.cost.shape[0]

    def check(self, rows: int) -> None:
        """Refuse data that would make the kernels read outside their arrays, or that no polytope fits.

        Args:
            rows: Number of rows of A.

        Raises:
            ValueError: If a shape or value does not fit.
            TypeError: If a dtype does not fit.
        """
        # 1. shapes, dtypes, devices
        check_tensor("cost", self.cost, ndim=1, dtype=(torch.float32, torch.float64), finite=True)
        device = self.cost.device
        check_tensor("offsets", self.offsets, ndim=1, dtype=torch.int64, device=device, nonempty=True)
        check_tensor("index", self.index, dtype=torch.int32, device=device)
        if self.index.ndim not in {1, 2} or self.index.shape[0] != self.variables:
            raise ValueError(
                f"index: expected ({self.variables},) or ({self.variables}, k), got {tuple(self.index.shape)}"
            )
        # 2. what the kernels follow as indices
        check_indices("index", self.index, rows)
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        if not 0 <= first <= last < _VARIABLES:
            raise ValueError(f"offsets: expected values in [0, 2**48), got {first} to {last}")
        # 3. the polytopes, and that the least value of every block is finite
        if self.coefficient is not None:
            shape = tuple(self.index.shape)
            check_tensor(
                "coefficient", self.coefficient, shape=shape, dtype=self.cost.dtype, device=device, finite=True
            )
        local = self.offsets - first
        check_family(self.variables, local, self.cap, self.upper, self.weight, self.equality, self.cost.dtype)
        bounded = self.upper is not None and bool(torch.isfinite(self.upper).all())
        if not bounded and not bool(torch.isfinite(self.cap).all()):
            raise ValueError("cap: expected finite values where upper bounds are not, got an infinite one")


def check_data(data: Any, rows: int) -> None:
    """Refuse anything but blocks that fit; see `BlockData.check`."""
    if not isinstance(data, BlockData):
        raise TypeError(f"data: expected BlockData, got {type(data).__name__}")
    data.check(rows)


def dual_pass(
    data: BlockData,
    lam: Tensor,
    gamma: float,
    scale: Tensor,
    bounds: Tensor,
    *,
    anchor: Tensor | None = None,
    shrink: Tensor | None = None,
    primal: bool = False,
    check: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Project every block at the reduced costs $c + A'\lambda$ and sum what the dual needs.

    Args:
        data: The blocks.
        lam: Multipliers of the rows, shape (rows,), float64.
        gamma: Weight of the ridge, above 0.
        scale: Fixed-point factor of every sum, shape (2 rows + 5,), float64; `2**62` over a bound of the sum's size.
        bounds: Blocks at which the chunks begin and end, shape (chunks + 1,), int64.
        anchor: Proximal center $p$, shape (variables,), dtype of the costs; None for the origin.
        shrink: Factor by which x is multiplied where a variable appears in the row (least over its rows),
            shape (rows,), float64; None for ones.
        primal: Whether x itself is wanted.
        check: Whether the data are checked; pass False for data that were checked once, with as many rows.

    Returns:
        Fixed-point sums, shape (2 rows + 5,), int64: A x at the even and c'x by row at the odd positions (0 with
        several rows per variable), then `TOTALS`; and x, shape (variables,) or (0,), float64.

    Raises:
        ValueError: If a shape, device or value does not fit, or a sum has no room in 64 bits at its scale.
        TypeError: If a dtype does not fit.
    """
    check_number("gamma", gamma, low=0.0, open_low=True, high=math.inf, open_high=True)
    check_tensor("lam", lam, ndim=1, dtype=torch.float64, finite=True)
    check_flag("primal", primal)
    if check:
        _check(data, lam, scale, bounds, anchor, shrink)
    sums, x = _pass(
        data.offsets,
        data.index,
        data.cost,
        data.coefficient,
        lam,
        gamma,
        data.cap,
        data.upper,
        data.weight,
        data.equality,
        anchor,
        shrink,
        scale,
        bounds,
        primal,
    )
    return sums, x


def _check(
    data: BlockData, lam: Tensor, scale: Tensor, bounds: Tensor, anchor: Tensor | None, shrink: Tensor | None
) -> None:
    rows, device = lam.shape[0], lam.device
    check_data(data, rows)
    check_tensor("lam", lam, device=data.cost.device)
    sums = 2 * rows + len(TOTALS)
    check_tensor("scale", scale, shape=(sums,), dtype=torch.float64, device=device, finite=True)
    check_tensor("bounds", bounds, ndim=1, dtype=torch.int64, device=device, nonempty=True)
    check_offsets("bounds", bounds, data.blocks)
    if anchor is not None:
        shape = (data.variables,)
        check_tensor("anchor", anchor, shape=shape, dtype=data.cost.dtype, device=device, finite=True)
    if shrink is not None:
        check_tensor("shrink", shrink, shape=(rows,), dtype=torch.float64, device=device, finite=True)
