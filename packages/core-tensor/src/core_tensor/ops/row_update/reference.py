"""Plain torch: a sort, an index_add, and the textbook formulas on the rows that were touched."""

from torch import Tensor


def row_update(
    weight: Tensor,
    first: Tensor | None,
    second: Tensor,
    ids: Tensor,
    grad: Tensor,
    kind: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """See `core_tensor.row_update`."""
    rows, inverse = ids.unique(return_inverse=True)
    g = grad.new_zeros(len(rows), grad.shape[1]).index_add_(0, inverse, grad)  # (u, D)
    w = weight[rows] * (1 - lr * weight_decay)
    if kind == "adam":
        assert first is not None
        m = first[rows].mul_(beta1).add_(g, alpha=1 - beta1)
        v = second[rows].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        first[rows] = m
        denominator = (v / (1 - beta2**step)).sqrt_().add_(eps)
        weight[rows] = w - lr / (1 - beta1**step) * m / denominator
    else:
        v = second[rows] + g.square().mean(1)  # (u,)
        weight[rows] = w - lr * g / (v.sqrt() + eps)[:, None]
    second[rows] = v
