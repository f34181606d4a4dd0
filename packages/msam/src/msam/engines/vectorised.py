"""mSAM over all micro-batches at once: `torch.func.vmap` with a copy of the weights per micro-batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from msam.engines.sequential import poison
from msam.step.checks import check_loss
from msam.step.functional import msam_grad
from msam.step.options import Options
from msam.step.perturbation import Tracked
from msam.step.record import StepRecord


class _Loss(nn.Module):
    """The user's loss function as a module around the model, so that `functional_call` can swap the weights."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(batch)


def vectorised_gradient(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    batch: Any,
    tracked: Tracked,
    options: Options,
    *,
    scale: Callable[[Tensor], Tensor] | None,
    weight: float,
) -> StepRecord:
    """Add the weighted mSAM gradient of a batch to `.grad`, all micro-batches in one call.

    It needs m copies of the weights and a loss that `torch.func` can transform (no batch norm in training mode), and
    pays only for many small micro-batches; ghost mode is faster wherever it applies.

    Args:
        model: The model that `loss_fn` calls.
        loss_fn: Mean loss of a micro-batch.
        batch: Tree of tensors, examples first.
        tracked: What is perturbed: all trainable parameters, with one radius.
        options: mSAM's options.
        scale: GradScaler's scaling of a loss, or None.
        weight: Factor of this batch's gradient.

    Returns:
        The step's record.

    Raises:
        ValueError: If some parameters are not perturbed, radii differ, or micro-batches are weighted.
    """
    names = {f"model.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    if set(map(id, names.values())) != set(map(id, tracked.parameters)) or len(set(tracked.radii)) != 1:
        raise ValueError("mode: 'vmap' expects all trainable parameters to be perturbed with one radius")
    if (
        options.shard_weight is not None
        or options.reduction == "sum"
        or any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
    ):
        raise ValueError(
            "mode: 'vmap' goes with neither shard_weight, reduction='sum' nor batch norm in training mode; use "
            "'sequential'"
        )
    wrapper = _Loss(model, loss_fn)

    def functional(params: Any, part: Any) -> Tensor:
        return check_loss(functional_call(wrapper, dict(params), (part,)), finite=False)

    gradients, aux = msam_grad(
        functional, names, batch, rho=tracked.radii[0], mode="vmap",
        num_micro_batches=options.num_micro_batches, micro_batch_size=options.micro_batch_size, rng=options.rng,
        check_finite=options.check_finite and scale is None,
    )  # fmt: skip
    factor = torch.full((), weight) if scale is None else scale(torch.full((), weight, device=aux.loss.device))
    for name, p in names.items():
        g = gradients[name] * factor.to(p)
        p.grad = g if p.grad is None else p.grad + g
    skipped = scale is not None and not bool(torch.isfinite(aux.gradient_norms).all())
    if skipped:
        poison(tracked.parameters)
    return StepRecord("vmap", tracked.radii[0], aux.loss, aux.perturbed_loss, aux.gradient_norms, skipped)
