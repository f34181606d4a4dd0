r"""Projection of blocks of items by slots onto the hull of assignments, by the vertices it consists of.

$$ \min_x \lVert x - y \rVert^2 \quad \text{with } x \ge 0, \; \sum_i x_{ik} = 1 \text{ (or} \le 1\text{) per slot } k,
\; \sum_k x_{ik} \le 1 \text{ per item } i. $$

Wolfe's nearest-point method: a corral of vertices whose hull holds x; while an assignment improves on x along y - x it
joins, and what the affine minimiser gives no weight leaves. Far from the polytope, where a small ridge puts y, the
corral is one or two vertices. Sources: arXiv 2103.05277, the vertex-oriented projection; Wolfe 1976,
https://doi.org/10.1007/BF01580381.
"""

import torch
from torch import Tensor

from core_tensor.checks import check_flag, check_number, check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.project_assignment import cpu, reference

MOST = (1 << 31) - 1
"""Slots, and vertices of a corral, at most: they are counted in 32 bits."""


def _fake(values: Tensor, offsets: Tensor, slots: int, filled: bool, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    del filled
    blocks = offsets.shape[0] - 1
    items = values.new_empty((blocks, limit, slots), dtype=torch.int32)
    return torch.empty_like(values), values.new_empty(blocks, limit), items


_project = operator(
    "project_assignment(Tensor values, Tensor offsets, int slots, bool filled, int limit) -> (Tensor, Tensor, Tensor)",
    reference=reference.project_assignment,
    fake=_fake,
    cpu=cpu.project_assignment,
)


def project_assignment(
    values: Tensor, offsets: Tensor, slots: int, *, filled: bool = True, limit: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Project every block, and name the assignments that its projection is made of.

    A block is solved by one thread and many by several, on the CPU whatever the device of `values`. A block whose
    corral outgrows `limit` has no weights and x = 0: solve it by a quadratic program.

    Args:
        values: Points y, items by slots in row-major order, blocks one behind another, shape (variables,), float64.
        offsets: Bounds of the blocks, shape (blocks + 1,), int64.
        slots: Slots per block.
        filled: Whether every slot must be filled; a block then needs at least as many items.
        limit: Most vertices of a corral.

    Returns:
        x, shape (variables,), float64; weights of the vertices, zero behind the last, shape (blocks, limit), float64;
        item of every slot, -1 for none, shape (blocks, limit, slots), int32. No gradient passes.

    Raises:
        ValueError: If a shape, device or value does not fit.
        TypeError: If a dtype does not fit.
        MemoryError: If there is too little memory for a block of so many slots.
    """
    check_tensor("values", values, ndim=1, dtype=torch.float64)
    check_tensor("offsets", offsets, ndim=1, dtype=torch.int64, device=values.device, nonempty=True)
    check_number("slots", slots, low=1, high=MOST, integer=True)
    check_number("limit", limit, low=1, high=MOST, integer=True)
    check_flag("filled", filled)
    place = "meta" if values.is_meta else "cpu"
    found: tuple[Tensor, Tensor, Tensor] = _project(values.detach().to(place), offsets.to(place), slots, filled, limit)
    return found if values.is_cpu else tuple(t.to(values.device) for t in found)  # type: ignore[return-value]
