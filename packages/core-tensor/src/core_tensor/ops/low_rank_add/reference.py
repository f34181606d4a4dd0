"""Plain torch: two batched products."""

import torch
from torch import Tensor


@torch.no_grad()
def low_rank_add(
    base: Tensor | None, x: Tensor, inner: Tensor, outer: Tensor, coefficient: Tensor, bias: float, out: Tensor
) -> None:
    """See `core_tensor.low_rank_add`."""
    n = len(inner)
    products = x.unflatten(0, (n, -1)) @ inner.mT  # (n, rows, r)
    products.add_(bias).mul_(coefficient[:, None, None])
    by_micro_batch = out.unflatten(0, (n, -1))
    if base is None:
        torch.bmm(products, outer, out=by_micro_batch)
        return
    if base is not out:
        out.copy_(base)
    by_micro_batch.baddbmm_(products, outer)
