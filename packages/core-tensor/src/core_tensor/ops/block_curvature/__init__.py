r"""Generalized Hessian of the ridge-smoothed dual of a block-separable LP, for second-order steps.

$$ -\gamma \nabla^2 g_\gamma(\lambda) \ni \sum_i A_i P_i A_i', \qquad
P_i = I_F - \frac{w_F w_F'}{w_F'w_F} \text{ where the cut is tight, else } I_F, \qquad F = \{0 < x_i < u_i\}, $$

with $x_i$ the projections that `dual_pass` computes. Blocks at a vertex add nothing, so the cost is that of the
fractional ones. Every term is added as a 64-bit fixed-point number: threads and ranks cannot change a result.
"""

import math

import torch
from torch import Tensor

from core_tensor.checks import check_number, check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.block_curvature import cpu, reference
from core_tensor.ops.dual_pass import BlockData, check_data

ROWS = (1 << 30) - 1
"""Rows at most: 64 bits address no larger square matrix of 64-bit numbers."""


def _fake(
    offsets: Tensor,
    index: Tensor,
    coefficient: Tensor | None,
    x: Tensor,
    cap: Tensor,
    upper: Tensor | None,
    weight: Tensor | None,
    equality: bool,
    rows: int,
    scale: float,
) -> Tensor:
    return x.new_empty((rows, rows), dtype=torch.int64)


_curvature = operator(
    "block_curvature(Tensor offsets, Tensor index, Tensor? coefficient, Tensor x, Tensor cap, Tensor? upper, "
    "Tensor? weight, bool equality, int rows, float scale) -> Tensor",
    reference=reference.block_curvature,
    fake=_fake,
    cpu=cpu.block_curvature,
    cuda="core_tensor.ops.block_curvature.triton:block_curvature",
)


def block_curvature(data: BlockData, x: Tensor, rows: int, scale: float, *, check: bool = True) -> Tensor:
    r"""Sum $A_i P_i A_i'$ over the blocks.

    Args:
        data: The blocks.
        x: Their projections, shape (variables,), float64.
        rows: Number of rows of A.
        scale: Fixed-point factor; `2**61` over a bound of the entries, such as the greatest squared norm of a row.
        check: Whether the data are checked; pass False for data that were checked once, with as many rows.

    Returns:
        The sum times `scale`, rounded, shape (rows, rows), int64.

    Raises:
        ValueError: If a shape, device or value does not fit, or an entry has no room in 64 bits at this scale.
        TypeError: If a dtype does not fit.
    """
    check_number("rows", rows, low=0, high=ROWS, integer=True)
    check_number("scale", scale, low=0.0, open_low=True, high=math.inf, open_high=True)
    if check:
        check_data(data, rows)
    check_tensor("x", x, shape=(data.variables,), dtype=torch.float64, device=data.cost.device)
    summed: Tensor = _curvature(
        data.offsets, data.index, data.coefficient, x, data.cap, data.upper, data.weight, data.equality, rows, scale
    )
    return summed
