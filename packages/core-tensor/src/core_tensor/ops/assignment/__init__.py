r"""Linear assignment: the cheapest way to give every row its own column.

$$ \min_\sigma \sum_i C_{i \sigma(i)}, \qquad \sigma \text{ a permutation of } 1, \dots, n. $$

Shortest augmenting paths with prices v of the columns; the compiled kernel starts them from column reduction, reduction
transfer and augmenting row reduction, which leaves few rows for the paths.
Source: Jonker and Volgenant 1987, https://doi.org/10.1007/BF02278710.
"""

import torch
from torch import Tensor

from core_tensor.checks import check_tensor, has_values
from core_tensor.ops._operator import operator
from core_tensor.ops.assignment import cpu, reference

LARGEST = 1e150
"""Larger costs are scaled, so that sums of them stay in range."""


def _fake(cost: Tensor) -> Tensor:
    return cost.new_empty(cost.shape[:2], dtype=torch.int64)


_assignment = operator(
    "assignment(Tensor cost) -> Tensor", reference=reference.assignment, fake=_fake, cpu=cpu.assignment
)


def assignment(cost: Tensor) -> Tensor:
    """Exact minimum-cost assignment of square matrices.

    One path depends on the one before it, so a matrix is solved by one thread and a batch by several, on the CPU
    whatever the device of `cost`. Among assignments of equal cost, which one is returned is not specified.

    Args:
        cost: Costs, shape (n, n) or (batch, n, n), floating; solved in float64.

    Returns:
        Column of every row, shape (n,) or (batch, n), int64, on the device of `cost`; no gradient passes.

    Raises:
        ValueError: If the matrices are not square, or a cost is NaN or infinite.
        TypeError: If `cost` is not floating.
    """
    check_tensor("cost", cost)
    if not cost.dtype.is_floating_point:
        raise TypeError(f"cost: expected floating costs, got {cost.dtype}")
    if cost.ndim not in (2, 3) or cost.shape[-1] != cost.shape[-2]:
        raise ValueError(f"cost: expected shape (n, n) or (batch, n, n), got {tuple(cost.shape)}")
    if cost.numel() == 0:
        return torch.empty(cost.shape[:-1], dtype=torch.int64, device=cost.device)
    place = "meta" if cost.is_meta else "cpu"
    matrices = cost.detach().to(place, torch.float64).reshape(-1, *cost.shape[-2:])
    size = matrices.abs().max()
    if not has_values(size):
        matrices = matrices / torch.where(size > LARGEST, size, 1.0)
    elif not float(size) <= LARGEST:
        check_tensor("cost", cost, finite=True)
        matrices = matrices / size
    columns: Tensor = _assignment(matrices)
    return columns.reshape(cost.shape[:-1]).to(cost.device)
