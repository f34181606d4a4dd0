r"""MAP estimates of many small logistic models that share one Gaussian prior: the vectors of a batch of members.

Task t has rows $(h_i, b_i, y_i, w_i)$, $i < \text{length}_t$, a prior mean $\mu_t$ and the precision P that all share:

$$ e_t = \arg\min_e F_t(e), \qquad
F_t(e) = \sum_i w_i \bigl[ \log(1 + e^{z_i}) - y_i z_i \bigr] + \tfrac12 (e - \mu_t)^\top P (e - \mu_t), \qquad
z_i = b_i + h_i^\top e, $$

by damped Newton steps, which converge for every support, a separable one too, because P is positive definite. The
second result is the Hessian $H_t = \sum_i w_i \sigma_i (1 - \sigma_i) h_i h_i^\top + P$ at $e_t$, the precision of
Laplace's approximation to the posterior. An empty task gives $\mu_t$ and P.

The gradient comes from the optimality condition $\nabla F_t(e_t) = 0$ (implicit function theorem): with
$v = H_t^{-1} \, \partial L / \partial e_t$, for example $\partial L / \partial \mu_t = P v$ and
$\partial L / \partial b_i = - w_i \sigma_i (1 - \sigma_i) \, h_i^\top v$. So it is that of the exact minimum, not of
the steps, and needs no graph of them. No gradient passes through $H_t$.

Source: the inner problem of LiMAML (arXiv 2403.00803) where the adapted vector enters the logit linearly.
"""

from typing import Any

import torch
from torch import Tensor

from core_tensor.checks import check_number, check_tensor, has_values
from core_tensor.ops._operator import operator
from core_tensor.ops.map_head import cpu, reference

WIDEST = 32
"""Largest width d: a task's system stays in the first cache."""


def _fake(
    h: Tensor, base: Tensor, y: Tensor, w: Tensor, lengths: Tensor, mu: Tensor, P: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mu, memory_format=torch.contiguous_format), h.new_empty(h.shape[0], h.shape[2], h.shape[2])


def _fake_backward(
    v: Tensor, e: Tensor, h: Tensor, base: Tensor, y: Tensor, w: Tensor, lengths: Tensor, mu: Tensor, P: Tensor
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (h, base, y, w, mu, P))


_map_head_backward = operator(
    "map_head_backward(Tensor v, Tensor e, Tensor h, Tensor base, Tensor y, Tensor w, Tensor lengths, Tensor mu,"
    " Tensor P) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.map_head_backward,
    fake=_fake_backward,
    cpu=cpu.map_head_backward,
    cuda="core_tensor.ops.map_head.triton:map_head_backward",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    e, H = output
    ctx.mark_non_differentiable(H)
    ctx.save_for_backward(e, *inputs[:7])


def _backward(ctx: Any, to_e: Tensor, to_H: Tensor) -> tuple[Tensor | None, ...]:
    e, h, base, y, w, lengths, mu, P = ctx.saved_tensors
    to_h, to_base, to_y, to_w, to_mu, to_P = _map_head_backward(to_e, e, h, base, y, w, lengths, mu, P)
    return to_h, to_base, to_y, to_w, None, to_mu, to_P, None


_map_head = operator(
    "map_head(Tensor h, Tensor base, Tensor y, Tensor w, Tensor lengths, Tensor mu, Tensor P, int steps)"
    " -> (Tensor, Tensor)",
    reference=reference.map_head,
    fake=_fake,
    cpu=cpu.map_head,
    cuda="core_tensor.ops.map_head.triton:map_head",
    setup_context=_setup_context,
    backward=_backward,
)


def map_head(
    h: Tensor, base: Tensor, y: Tensor, w: Tensor, lengths: Tensor, mu: Tensor, P: Tensor, *, steps: int = 50
) -> tuple[Tensor, Tensor]:
    """MAP vectors of T tasks and their posterior precisions; differentiable in everything but `lengths`.

    Sums run in float64 whatever the dtype; a task's result does not depend on the other tasks of the batch. Rows behind
    a task's length are never read into the result, so padding may hold anything.

    Args:
        h: Item vectors of the supports, shape (T, L, d), float32 or float64, d up to 32.
        base: Logits without the member's part, shape (T, L), in the dtype of h as all others.
        y: Labels in [0, 1], shape (T, L).
        w: Weights >= 0, shape (T, L).
        lengths: Rows of every task, 0 to L, shape (T,), int64.
        mu: Prior means, shape (T, d).
        P: Prior precision, symmetric positive definite, shape (d, d).
        steps: Most Newton steps of a task. It stops by itself once a step moves no logit by more than 1e-6 (in float32
            on the CPU 3e-5, since what one more changes would be lost in rounding), after four to six steps as a rule;
            fewer than it needs leave a vector whose gradient is not exact either.

    Returns:
        Vectors e, shape (T, d), and precisions H, shape (T, d, d), through which no gradient passes.

    Raises:
        ValueError: If shapes do not fit, a length, label or weight is out of range, a value is not finite, or P is not
            positive definite.
        TypeError: If dtypes differ, or that of h is neither float32 nor float64.
    """
    check_tensor("h", h, ndim=3, dtype=(torch.float32, torch.float64))
    tasks, rows, d = h.shape
    if not 1 <= d <= WIDEST:
        raise ValueError(f"h: expected a width of 1 to {WIDEST}, got {d}")
    for name, value in (("base", base), ("y", y), ("w", w)):
        check_tensor(name, value, shape=(tasks, rows), dtype=h.dtype, device=h.device)
    check_tensor("lengths", lengths, shape=(tasks,), dtype=torch.int64, device=h.device)
    check_tensor("mu", mu, shape=(tasks, d), dtype=h.dtype, device=h.device, finite=True)
    check_tensor("P", P, shape=(d, d), dtype=h.dtype, device=h.device, finite=True)
    check_number("steps", steps, low=1, high=1000, integer=True)
    _check_values(*(t.detach() for t in (h, base, y, w, lengths, P)))
    found: tuple[Tensor, Tensor] = _map_head(h, base, y, w, lengths, mu, P, steps)
    return found


def _check_values(h: Tensor, base: Tensor, y: Tensor, w: Tensor, lengths: Tensor, P: Tensor) -> None:
    if not has_values(h):
        return
    rows = h.shape[1]
    if lengths.numel():
        low, high = (int(v) for v in lengths.aminmax())
        if low < 0 or high > rows:
            raise ValueError(f"lengths: expected values in [0, {rows}], the rows of h, got {low} to {high}")
    inside = torch.arange(rows, device=h.device) < lengths[:, None]
    for name, value, top in (("y", y, 1.0), ("w", w, torch.inf)):
        bad = inside & ~((value >= 0) & (value <= top) & (value < torch.inf))
        if bool(bad.any()):
            end = f"{top:g}]" if top < torch.inf else "inf)"
            raise ValueError(f"{name}: expected values in [0, {end}, got {float(value[bad][0])}")
    for name, value in (("base", base), ("h", h)):
        # one pass in the common case; only padding that is not finite asks for the second
        if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value[inside]).all()):
            raise ValueError(f"{name}: expected finite values within the lengths")
    if not torch.equal(P, P.T) and not torch.allclose(P, P.T, rtol=1e-4, atol=1e-6 * float(P.abs().max())):
        raise ValueError("P: expected a symmetric matrix")
    if int(torch.linalg.cholesky_ex(P)[1]):
        raise ValueError("P: expected a positive definite matrix")
