"""Plain torch in float64, one dense factor per block: the truth for `core_tensor.block_curvature`."""

import torch
from torch import Tensor

from core_tensor.ops.dual_pass.reference import add_fixed_point
from core_tensor.ops.project_blocks import reference as blocks_reference


def block_curvature(
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
    """See `core_tensor.block_curvature`."""
    n = x.shape[0]
    local = offsets - offsets[0]
    at = index.reshape(n, -1).long()
    a = torch.ones_like(at, dtype=torch.float64) if coefficient is None else coefficient.double().reshape(n, -1)
    wide = None if upper is None else upper.double()
    result = torch.zeros(rows, rows, dtype=torch.int64, device=x.device)
    for i in range(local.shape[0] - 1):
        v = slice(int(local[i]), int(local[i + 1]))
        length = v.stop - v.start
        bounds = torch.tensor([0, length], device=x.device)
        own = cap if cap.shape[0] == 1 else cap[i : i + 1]
        u = wide if wide is None or wide.shape[0] == 1 else wide[v]
        w = None if weight is None else weight[v].double()
        columns = torch.eye(length, dtype=torch.float64, device=x.device)
        P = [blocks_reference.tangent(e, x[v], bounds, own, u, w, equality) for e in columns]
        A = torch.zeros(rows, length, dtype=torch.float64, device=x.device)
        A.index_put_(
            (at[v].reshape(-1), torch.arange(length, device=x.device).repeat_interleave(at.shape[1])),
            a[v].reshape(-1),
            accumulate=True,
        )
        if length:
            add_fixed_point(result, A @ torch.stack(P) @ A.T * scale)
    return result
