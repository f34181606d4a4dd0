"""Plain torch: two batched products."""

from torch import Tensor


def low_rank_add_(y: Tensor, x: Tensor, inner: Tensor, outer: Tensor, coefficient: Tensor, bias: float) -> None:
    """See `core_tensor.low_rank_add_`."""
    n = len(inner)
    products = x.unflatten(0, (n, -1)) @ inner.mT  # (n, rows, r)
    y.unflatten(0, (n, -1)).baddbmm_(products.add_(bias).mul_(coefficient[:, None, None]), outer)
