"""Plain torch, a vector operation for every line of the formula."""

import torch
from torch import Tensor


def check_scale(scale: Tensor) -> None:
    """Refuse factors of 0 or less."""
    if not bool((scale > 0).all()):
        raise ValueError(f"scale: expected positive factors, got {float(scale.min())}")


def dual_bounds(
    sums: Tensor, scale: Tensor, lam: Tensor, budgets: Tensor, free: Tensor | None, keep: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `core_tensor.dual_bounds`."""
    check_scale(scale)
    m = lam.shape[0]
    values = sums.double() / scale
    load, spent, limit = values[: 2 * m : 2], values[1 : 2 * m : 2], keep * budgets
    gradient = load - budgets
    shrink = torch.where(load > limit, limit / load, 1.0)
    excess = (gradient if free is None else torch.where(free, gradient.abs(), gradient)) / (1.0 + budgets.abs())
    violation = excess.max().clamp_min(0.0) if m else lam.new_zeros(())
    found = torch.stack([lam @ gradient, lam @ budgets, violation, spent @ shrink])
    return gradient, shrink, torch.cat([values[2 * m :], found])
