"""Plain torch in float64, chunk by chunk: the truth for `core_tensor.dual_pass`."""

import torch
from torch import Tensor

from core_tensor.ops.project_blocks import reference as blocks_reference

NO_ROOM = "scale: expected at most 2**62 over a bound of every sum, but a sum has no room in 64 bits"


def add_fixed_point(total: Tensor, values: Tensor) -> None:
    """Add numbers, rounded, to 64-bit whole numbers in place; refuses what has no room there."""
    after = total + torch.round(values).nan_to_num(0.0, 0.0, 0.0).long()
    wraps = ((total < after) != (values > 0)) & (values.round() != 0)
    if bool((wraps | ~(values.abs() < 2.0**63)).any()):
        raise ValueError(NO_ROOM)
    total.copy_(after)


def dual_pass(
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
    """See `core_tensor.dual_pass`."""
    m, n = lam.shape[0], cost.shape[0]
    local = offsets - offsets[0]
    rows = index.reshape(n, -1).long()  # (variables, rows per variable)
    c = cost.double()
    a = torch.ones_like(rows, dtype=torch.float64) if coefficient is None else coefficient.double().reshape(n, -1)
    r = c + (a * lam[rows]).sum(1)
    p = torch.zeros_like(c) if anchor is None else anchor.double()
    x = blocks_reference.project_blocks(p - r / gamma, local, cap, upper, weight, equality)
    block, w, u = blocks_reference.bounds(n, local, cap, upper, weight)
    blocks = local.shape[0] - 1
    between = blocks_reference.sums(((x > 0) & (x < u * (1 - 1e-12))).double(), block, blocks)
    tight = (blocks_reference.sums(w * x, block, blocks) >= cap.expand(blocks) * (1 - 1e-12)) | equality
    least = blocks_reference.least_value(r, local, cap, upper, weight, equality)
    if shrink is not None:
        factor = torch.where(a != 0, shrink[rows], 1.0).amin(1).clamp_max(1.0) if n else c
        x = x * factor
    result = torch.zeros_like(scale, dtype=torch.int64)
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        v = slice(int(local[begin]), int(local[end]))
        sums = torch.zeros_like(scale)
        sums[: 2 * m : 2].index_add_(0, rows[v].reshape(-1), (a[v] * x[v, None]).reshape(-1))
        if rows.shape[1] == 1:
            sums[1 : 2 * m : 2].index_add_(0, rows[v, 0], c[v] * x[v])
        sums[2 * m] = (c[v] * x[v]).sum()
        sums[2 * m + 1] = (x[v] - p[v]).square().sum()
        sums[2 * m + 2] = least[begin:end].sum()
        sums[2 * m + 3] = ((between > 0) & ~((between == 1) & tight))[begin:end].sum()
        sums[2 * m + 4] = (x[v] > 0).sum()
        add_fixed_point(result, sums * scale)
    return result, x if primal else x[:0]
