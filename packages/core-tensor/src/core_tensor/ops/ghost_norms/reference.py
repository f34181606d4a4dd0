"""Plain torch: the two Gram matrices as batched products."""

import torch
from torch import Tensor


def ghost_norms(left: list[Tensor], right: list[Tensor], bias: list[float]) -> Tensor:
    """See `core_tensor.ghost_norms`."""
    squares = torch.zeros(left[0].shape[0], dtype=torch.float64, device=left[0].device)
    for a, b, beta in zip(left, right, bias, strict=True):
        squares += (torch.bmm(a, a.mT) * (torch.bmm(b, b.mT) + beta)).sum((1, 2), dtype=torch.float64)
    return squares
