"""mSAM's gradient as a pure function of parameters and a batch, in the manner of `torch.func`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from core_tensor.checks import check_choice, check_number
from torch import Tensor
from torch.func import grad_and_value, vmap

from msam.step.batches import batch_size, cut, narrow, tree_map
from msam.step.checks import check_finite_loss, check_finite_norms
from msam.step.passes import Generators
from msam.step.perturbation import norm_of

Parameters = Mapping[str, Tensor]
Loss = Callable[[Parameters, Any], Tensor]


@dataclass(frozen=True)
class Aux:
    """What `msam_grad` returns beside the gradient.

    Attributes:
        loss: Mean loss at the parameters, scalar.
        perturbed_loss: Mean loss at the perturbed parameters, scalar.
        gradient_norms: ||g_j||, shape (m,).
    """

    loss: Tensor
    perturbed_loss: Tensor
    gradient_norms: Tensor


def msam_grad(
    loss_fn: Loss,
    params: Parameters,
    batch: Any,
    *,
    rho: float = 0.05,
    num_micro_batches: int | None = None,
    micro_batch_size: int | None = None,
    mode: Literal["sequential", "vmap"] = "sequential",
    chunk_size: int | None = None,
    rng: Literal["same", "independent"] = "same",
    check_finite: bool = True,
) -> tuple[dict[str, Tensor], Aux]:
    r"""The gradient $\sum_j \frac{n_j}{n} \nabla L_{S_j}(w + \rho\, g_j/\|g_j\|)$, without touching the parameters.

    Args:
        loss_fn: `loss_fn(params, batch)`, the mean loss of a (micro-)batch, differentiable by `torch.func`.
        params: Parameters w by name.
        batch: Tensor or tree of tensors, examples first.
        rho: Radius, >= 0.
        num_micro_batches: Number m of micro-batches.
        micro_batch_size: Examples per micro-batch (exactly one of the two is given).
        mode: `"sequential"`, or `"vmap"`: all micro-batches at once, holding m copies of the parameters.
        chunk_size: Micro-batches that one vmap call takes, >= 1; None for all.
        rng: `"same"` repeats the dropout masks of pass 1 in pass 2, `"independent"` draws them anew.
        check_finite: Whether a NaN or infinite loss or ascent gradient raises (reads values: False under transforms).

    Returns:
        Gradients by name, and losses and norms.

    Raises:
        ValueError: If an argument is out of range, there are no parameters, or a loss or ascent gradient is not finite.

    Source: arXiv 2302.09693, section 3.
    """
    check_number("rho", rho, low=0.0, high=float("inf"), open_high=True)
    check_choice("mode", mode, ("sequential", "vmap"))
    check_choice("rng", rng, ("same", "independent"))
    if chunk_size is not None:
        check_number("chunk_size", chunk_size, low=1, integer=True)
    if not params:
        raise ValueError("params: expected at least one parameter, got none")
    shards = cut(batch_size(batch), num_micro_batches, micro_batch_size)
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    loss = perturbed = 0.0 * next(iter(total.values())).sum()
    norms = []
    for first, count, size in shards.runs:
        share = size / shards.total
        step = (chunk_size or count) if mode == "vmap" else 1
        for j in range(0, count, step):
            n = min(step, count - j)
            part = narrow(batch, shards.starts[first + j], n * size)
            part = tree_map(lambda t, n=n: t.reshape(n, -1, *t.shape[1:]) if t.ndim else t, part)  # type: ignore[misc]
            grads, early, late, norm = _shards(loss_fn, params, part, rho, n, rng)
            for name, value in grads.items():
                total[name].add_(value.sum(0), alpha=share)
            loss, perturbed = loss + share * early.sum(), perturbed + share * late.sum()
            norms.append(norm)
    aux = Aux(loss.detach(), perturbed.detach(), torch.cat(norms))
    if check_finite:
        check_finite_loss(aux.loss)
        check_finite_norms(aux.gradient_norms.tolist())
        check_finite_loss(aux.perturbed_loss)
    return total, aux


def _shards(
    loss_fn: Loss, params: Parameters, stacked: Any, rho: float, count: int, rng: str
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Both passes for `count` micro-batches of one size, stacked in front of the examples.

    Returns:
        Gradients (count, ...), losses at the weights and at the perturbed ones, gradient norms, each (count,).
    """
    w = {name: p.detach() for name, p in params.items()}
    differentiate = grad_and_value(loss_fn)
    dims = tree_map(lambda t: 0 if t.ndim else None, stacked)  # type: ignore[arg-type,return-value]
    rewind = Generators({p.device for p in w.values()}).rewind if rng == "same" else lambda: None
    if count == 1:  # plain calls: vmap of one would only add its overhead and its limits
        part = tree_map(lambda t: t[0] if t.ndim else t, stacked)
        g, early = differentiate(w, part)
        norm = norm_of(list(g.values()))
        c = torch.where(norm > 0, rho / norm, 0.0)
        rewind()
        grads, late = differentiate({name: p + c * g[name] for name, p in w.items()}, part)
        return {name: v[None] for name, v in grads.items()}, early[None], late[None], norm[None]
    g, early = vmap(differentiate, in_dims=(None, dims), randomness="different")(w, stacked)
    norm = torch.stack([v.flatten(1).square().sum(1) for v in g.values()]).sum(0).sqrt()  # (count,)
    c = torch.where(norm > 0, rho / norm, 0.0)
    moved = {name: p + c.view(-1, *[1] * p.ndim) * g[name] for name, p in w.items()}
    rewind()
    grads, late = vmap(differentiate, in_dims=(0, dims), randomness="different")(moved, stacked)
    return grads, early, late, norm
