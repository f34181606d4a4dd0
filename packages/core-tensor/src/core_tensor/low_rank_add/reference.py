"""Plain torch: two batched products."""

from torch import Tensor


def low_rank_add_(y: Tensor, x: Tensor, inner: Tensor, outer: Tensor, coefficient: Tensor, bias: float) -> None:
    """See `core_tensor.low_rank_add_`."""
    y.baddbmm_((x @ inner.mT).add_(bias).mul_(coefficient[:, None, None]), outer)
