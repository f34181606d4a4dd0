r"""Gradient, bounds and repair of a smoothed dual from the sums of a `dual_pass`, in one loop over the rows.

With the load $A x$, the cost $s_j$ spent in row j and budgets b,

$$ \nabla g = A x - b, \qquad \sigma_j = \min\Bigl(1, \frac{\kappa \, b_j}{(A x)_j}\Bigr), \qquad
\text{repaired cost} = \sum_j \sigma_j s_j, \qquad \text{violation} = \max_j \frac{(A x - b)_j^+}{1 + |b_j|} , $$

with $|A x - b|_j$ in the violation of equations. Beside one pass over a million variables a dozen vector operations on
the rows would cost a fifth of the time, since their code has to be fetched anew every time.
Source: arXiv 2103.05277; the repair of one row per variable scales every row into its budget.
"""

import math

import torch
from torch import Tensor

from core_tensor.checks import check_number, check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.dual_bounds import cpu, reference

BOUNDS = ("cost", "square", "least", "fractional", "nonzero", "priced", "budget", "violation", "repaired")
"""What the third result holds: the totals of `dual_pass`, then lambda'(Ax - b), lambda'b, violation, repaired cost."""


def _fake(
    sums: Tensor, scale: Tensor, lam: Tensor, budgets: Tensor, free: Tensor | None, keep: float
) -> tuple[Tensor, Tensor, Tensor]:
    del sums, scale, budgets, free, keep
    return torch.empty_like(lam), torch.empty_like(lam), lam.new_empty(len(BOUNDS))


_bounds = operator(
    "dual_bounds(Tensor sums, Tensor scale, Tensor lam, Tensor budgets, Tensor? free, float keep) -> "
    "(Tensor, Tensor, Tensor)",
    reference=reference.dual_bounds,
    fake=_fake,
    cpu=cpu.dual_bounds,
)


def dual_bounds(
    sums: Tensor, scale: Tensor, lam: Tensor, budgets: Tensor, *, free: Tensor | None = None, keep: float = 1.0
) -> tuple[Tensor, Tensor, dict[str, float]]:
    r"""Read a dual pass.

    Args:
        sums: Fixed-point sums of `dual_pass`, or of several added up, shape (2 rows + 5,), int64.
        scale: Their factors, shape (2 rows + 5,), float64.
        lam: Multipliers $\lambda$, shape (rows,), float64.
        budgets: b, shape (rows,), float64.
        free: Which rows are equations, shape (rows,), bool; None for none.
        keep: $\kappa$, the share of a budget that the repair fills.

    Returns:
        Gradient, shape (rows,), float64; factors $\sigma$, shape (rows,), float64, of use where A and b are not
        negative; and the numbers named by `BOUNDS`.

    Raises:
        ValueError: If shapes or devices do not fit, a scale is not positive, or a number is NaN or infinite.
        TypeError: If a dtype does not fit.
    """
    check_tensor("lam", lam, ndim=1, dtype=torch.float64)
    rows = lam.shape[0]
    check_tensor("sums", sums, shape=(2 * rows + 5,), dtype=torch.int64, device=lam.device)
    check_tensor("scale", scale, shape=(2 * rows + 5,), dtype=torch.float64, device=lam.device)
    check_tensor("budgets", budgets, shape=(rows,), dtype=torch.float64, device=lam.device)
    if free is not None:
        check_tensor("free", free, shape=(rows,), dtype=torch.bool, device=lam.device)
    check_number("keep", keep, low=0.0, high=math.inf, open_high=True)
    gradient, shrink, found = _bounds(sums, scale, lam, budgets, free, keep)
    values = found.tolist()
    if not math.isfinite(sum(values)):  # looked at only where something is wrong: beside the kernel it takes long
        for name, tensor in (("lam", lam), ("scale", scale), ("budgets", budgets)):
            check_tensor(name, tensor, finite=True)
    return gradient, shrink, dict(zip(BOUNDS, values, strict=True))
