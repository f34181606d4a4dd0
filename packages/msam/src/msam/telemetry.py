"""Looking at a step without taking it: what the perturbation does, and proof that it happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from msam.batches import batch_size, cut, narrow
from msam.checks import check_loss
from msam.passes import Generators, kept_statistics, norm_layers, unsynchronised, world_size
from msam.perturbation import Moved, Tracked, norm_of, perturbation
from msam.sequential import GradientDrawer, shard_shares

if TYPE_CHECKING:
    from msam.optim import MSAM


@dataclass(frozen=True)
class Explanation:
    """Figures of one step, micro-batch by micro-batch.

    Attributes:
        loss: L_{S_j}(w), shape (m,).
        perturbed_loss: L_{S_j}(w + eps_j), shape (m,).
        gradient_norms: ||g_j||, shape (m,).
        perturbation_norms: ||eps_j||, shape (m,): rho each, unless a gradient vanishes or ASAM scales.
        cosines: Cosine of g_j with the mean gradient, shape (m,).
    """

    loss: tuple[float, ...]
    perturbed_loss: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    perturbation_norms: tuple[float, ...]
    cosines: tuple[float, ...]

    @property
    def sharpness_gaps(self) -> tuple[float, ...]:
        """L_{S_j}(w + eps_j) - L_{S_j}(w)."""
        return tuple(b - a for a, b in zip(self.loss, self.perturbed_loss, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """The figures as lists.

        Returns:
            One list per attribute, and `sharpness_gaps`.
        """
        return {k: list(v) for k, v in asdict(self).items()} | {"sharpness_gaps": list(self.sharpness_gaps)}


@dataclass(frozen=True)
class Check:
    """What the dry run measured.

    Attributes:
        mode: The engine that computed the gradient.
        perturbation_norm: Mean ||eps_j||.
        sharpness_gap: Mean of L_{S_j}(w + eps_j) - L_{S_j}(w).
        gradient_change: ||mSAM gradient - plain gradient|| / ||plain gradient||.
        engine_error: ||engine's gradient - brute force|| / ||brute force||, None with random layers (other masks).
    """

    mode: str
    perturbation_norm: float
    sharpness_gap: float
    gradient_change: float
    engine_error: float | None


@contextmanager
def undisturbed(optimizer: MSAM) -> Iterator[list[Tensor]]:
    """Leave statistics, generators and gradients as they were, whatever the block does.

    Args:
        optimizer: The optimizer whose model is looked at.

    Yields:
        The trainable parameters.

    Raises:
        ValueError: If the model is sharded by FSDP2.
    """
    if isinstance(optimizer.model, FSDPModule):
        raise ValueError("model: a sharded model cannot be looked at in weight space; use `record` after a step")
    trainable = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    generators, drawer = Generators({p.device for p in trainable}), GradientDrawer(trainable)
    try:
        with kept_statistics(norm_layers(optimizer.model)), unsynchronised(optimizer.model):
            yield trainable
    finally:
        drawer.close()
        generators.rewind()


def differentiate(
    loss_fn: Callable[[Any], Tensor], part: Any, parameters: list[Tensor] | tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradient of one micro-batch.

    Args:
        loss_fn: Mean loss of a (micro-)batch.
        part: The micro-batch.
        parameters: With respect to these.

    Returns:
        Detached loss, and gradients (zeros where the loss does not depend on a parameter).
    """
    loss = check_loss(loss_fn(part), finite=True)
    gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return loss.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def explain(optimizer: MSAM, loss_fn: Callable[[Any], Tensor], batch: Any) -> Explanation:
    """Both passes of every micro-batch, without updating anything.

    Args:
        optimizer: Whose options say how the batch is cut and how far it perturbs.
        loss_fn: Mean loss of a (micro-)batch.
        batch: Tree of tensors, examples first.

    Returns:
        Figures of every micro-batch.
    """
    with undisturbed(optimizer):
        tracked, parts, shares = _plan(optimizer, batch)
        early, late, norms, sizes, gradients = [], [], [], [], []
        halved = optimizer.options.ascent == "half"
        for part in parts:
            generators = Generators({p.device for p in tracked.parameters})
            loss, gradient = differentiate(loss_fn, part, tracked.parameters)
            if halved:
                _, climb = differentiate(loss_fn, ascent_part(optimizer, part), tracked.parameters)
            else:
                climb = [g.clone() for g in gradient]
            steps, norm = perturbation(tracked, climb)
            generators.rewind()
            with _at(tracked, steps), torch.no_grad():
                late.append(float(loss_fn(part)))
            early.append(float(loss))
            norms.append(float(norm))
            sizes.append(float(norm_of([s for s in steps if s is not None])))
            gradients.append(torch.cat([g.flatten() for g in gradient]))
        mean = torch.stack([s * g for s, g in zip(shares, gradients, strict=True)]).sum(0)
        cosines = [float(torch.nn.functional.cosine_similarity(g, mean, dim=0)) for g in gradients]
        return Explanation(tuple(early), tuple(late), tuple(norms), tuple(sizes), tuple(cosines))


def check(optimizer: MSAM, loss_fn: Callable[[Any], Tensor], batch: Any) -> Check:
    """Prove that the perturbation happens: compare a dry run of the engine with plain and brute-force gradients.

    Args:
        optimizer: An optimizer about to be used.
        loss_fn: Mean loss of a (micro-)batch.
        batch: Tree of tensors, examples first.

    Returns:
        The figures it compared.

    Raises:
        RuntimeError: If rho > 0 and the perturbation changes nothing, so that training would be plain.
    """
    told = explain(optimizer, loss_fn, batch)
    with undisturbed(optimizer) as trainable:
        tracked, parts, shares = _plan(optimizer, batch)
        plain = [torch.zeros_like(p) for p in trainable]
        brute = [torch.zeros_like(p) for p in trainable]
        for part, share in zip(parts, shares, strict=True):
            _, gradient = differentiate(loss_fn, part, trainable)
            torch._foreach_add_(plain, gradient, alpha=share)
            _, own = differentiate(loss_fn, ascent_part(optimizer, part), tracked.parameters)
            steps, _ = perturbation(tracked, own)
            with _at(tracked, steps):
                torch._foreach_add_(brute, differentiate(loss_fn, part, trainable)[1], alpha=share)
        mode, engine = _dry_run(optimizer, loss_fn, batch, trainable)
        size = float(norm_of(plain))
        change = float(norm_of(torch._foreach_sub(engine, plain))) / max(size, 1e-30)
        error = float(norm_of(torch._foreach_sub(engine, brute))) / max(float(norm_of(brute)), 1e-30)
        rewound = [differentiate(loss_fn, parts[0], trainable)[0] for _ in range(2)]
    mean_gap = sum(s * g for s, g in zip(shares, told.sharpness_gaps, strict=True))
    radius = sum(told.perturbation_norms) / len(told.perturbation_norms)
    if max(tracked.radii) > 0 and size > 0 and change == 0.0:
        raise RuntimeError(f"msam: the perturbation changes nothing (||eps|| = {radius:.3g}); training would be plain")
    return Check(mode, radius, mean_gap, change, error if bool(rewound[0] == rewound[1]) else None)


def ascent_part(optimizer: MSAM, part: Any) -> Any:
    """The examples of a micro-batch that its ascent direction comes from.

    Args:
        optimizer: Whose options say whether it is half of them.
        part: The micro-batch.

    Returns:
        Examples of the same structure.
    """
    size = batch_size(part)
    return narrow(part, 0, -(-size // 2)) if optimizer.options.ascent == "half" else part


def _plan(optimizer: MSAM, batch: Any) -> tuple[Tracked, list[Any], list[float]]:
    options = optimizer.options
    shards = cut(batch_size(batch), options.num_micro_batches, options.micro_batch_size)
    tracked = optimizer.tracked(options.radius(0, shards.count * world_size(optimizer.model)))
    parts = [narrow(batch, start, size) for start, size in zip(shards.starts, shards.sizes, strict=True)]
    return tracked, parts, shard_shares(parts, shards, options)


@contextmanager
def _at(tracked: Tracked, steps: list[Tensor | None]) -> Iterator[None]:
    moved = Moved(tracked.parameters)
    try:
        moved.move(steps)
        yield
    finally:
        moved.restore()


def _dry_run(
    optimizer: MSAM, loss_fn: Callable[[Any], Tensor], batch: Any, trainable: list[Tensor]
) -> tuple[str, list[Tensor]]:
    """The engine's own gradient, with the optimizer's bookkeeping put back.

    Returns:
        Name of the engine, and its gradients.
    """
    for p in trainable:
        p.grad = None
    kept = optimizer.record, optimizer._steps, optimizer._ready
    previous = list(optimizer._sequential.previous)
    optimizer._steps = 0  # a perturbed step, whatever `every` says about the next one
    try:
        optimizer.backward(loss_fn, batch)
        assert optimizer.record is not None
        mode = optimizer.record.mode
    finally:
        optimizer.record, optimizer._steps, optimizer._ready = kept
        optimizer._sequential.previous = previous
    return mode, [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
