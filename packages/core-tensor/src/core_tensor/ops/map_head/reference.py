"""Plain torch: damped Newton steps on all tasks at once in float64, and the adjoint of the optimality condition."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

_SMALL = 1.0  # up to this largest change of a logit the whole Newton step is safe
_CONVERGED = {torch.float32: 3e-5, torch.float64: 1e-6}  # of a logit: the step after it changes some square of it


def map_head(
    h: Tensor, base: Tensor, y: Tensor, w: Tensor, lengths: Tensor, mu: Tensor, P: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """See `core_tensor.map_head`."""
    dtype = h.dtype
    h, base, y, w, lengths = _masked(h, base, y, w, lengths)
    mu, P = mu.double(), P.double()
    e, active = mu.clone(), lengths > 0  # (T, d), (T,)
    for _ in range(steps):
        if not bool(active.any()):
            break
        z = base + (h @ e[:, :, None])[..., 0]  # (T, L)
        gradient = ((w * (z.sigmoid() - y))[:, None, :] @ h)[:, 0] + (e - mu) @ P  # (T, d)
        direction = -torch.linalg.solve(_hessian(h, w, z, P), gradient)  # (T, d)
        along = (h @ direction[:, :, None])[..., 0]  # (T, L), change of the logits
        reach = torch.where(w > 0, along.abs(), 0.0).amax(1)  # (T,)
        t = _step_sizes(e - mu, direction, z, along, gradient, reach, y, w, P)
        e = torch.where(active[:, None], e + t[:, None] * direction, e)
        active = active & (reach > _CONVERGED[dtype])
    z = base + (h @ e[:, :, None])[..., 0]
    return e.to(dtype), _hessian(h, w, z, P).to(dtype)


def _step_sizes(
    off: Tensor,
    direction: Tensor,
    z: Tensor,
    along: Tensor,
    gradient: Tensor,
    reach: Tensor,
    y: Tensor,
    w: Tensor,
    P: Tensor,
) -> Tensor:
    """Step size of every task: the largest of 1, 1/2, ... that decreases the objective, or the one that provably does.

    Along a line the logistic loss has |F'''| <= r F'', r the largest change of a logit (generalized self-concordance,
    Sun and Tran-Dinh 2019), so up to r = 1 the whole step decreases the objective, and t = log(1 + r) / r does beyond.
    """

    def objective(t: Tensor) -> Tensor:
        moved, at = z + t[:, None] * along, off + t[:, None] * direction
        return (w * (softplus(moved, threshold=800.0) - y * moved)).sum(1) + 0.5 * ((at @ P) * at).sum(1)

    safe = torch.where(reach > _SMALL, reach.log1p() / reach.clamp_min(1e-300), 1.0)
    slope = (gradient * direction).sum(1)
    start = objective(torch.zeros_like(safe))
    t = torch.ones_like(safe)
    while bool((bad := (t > safe) & ~(objective(t) <= start + 1e-4 * t * slope)).any()):
        t = torch.where(bad, torch.maximum(t / 2, safe), t)
    return t


def map_head_backward(
    v: Tensor, e: Tensor, h: Tensor, base: Tensor, y: Tensor, w: Tensor, lengths: Tensor, mu: Tensor, P: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, base, y, w, mu and P for the adjoint right-hand side v = dL/de."""
    dtype = h.dtype
    h, base, y, w, _ = _masked(h, base, y, w, lengths)
    e, mu, P = e.double(), mu.double(), P.double()
    z = base + (h @ e[:, :, None])[..., 0]  # (T, L)
    p = z.sigmoid()
    v = torch.linalg.solve(_hessian(h, w, z, P), v.double())  # (T, d): H^-1 dL/de
    hv = (h @ v[:, :, None])[..., 0]  # (T, L)
    s = w * p * (1 - p)
    inside = torch.arange(h.shape[1], device=h.device) < lengths[:, None]
    to_base = -s * hv
    to_h = -(w * (p - y))[..., None] * v[:, None, :] + to_base[..., None] * e[:, None, :]
    outer = -v.T @ (e - mu)
    results = (to_h, to_base, w * hv, torch.where(inside, -(p - y) * hv, 0.0), v @ P, (outer + outer.T) / 2)
    return tuple(t.to(dtype) for t in results)  # type: ignore[return-value]


def _masked(h: Tensor, base: Tensor, y: Tensor, w: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """Everything in float64, with zeros where a row is past its task's length: padding may hold anything."""
    inside = torch.arange(h.shape[1], device=h.device) < lengths[:, None]  # (T, L)
    h = torch.where(inside[..., None], h.double(), 0.0)
    return h, *(torch.where(inside, t.double(), 0.0) for t in (base, y, w)), lengths


def _hessian(h: Tensor, w: Tensor, z: Tensor, P: Tensor) -> Tensor:
    p = z.sigmoid()
    return (h * (w * p * (1 - p))[..., None]).mT @ h + P
