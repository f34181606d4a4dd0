"""Looking at a step without taking it: what the perturbation does, and proof that it happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msam.engines.sequential import shard_shares
from msam.step.batches import Shards, batch_size, cut, narrow
from msam.step.checks import check_loss
from msam.step.passes import Generators, is_sharded
from msam.step.perturbation import Tracked, moved, norm_of, perturbation, size_of

if TYPE_CHECKING:
    from msam.optimizer.optim import MSAM


@dataclass(frozen=True)
class Explanation:
    """Figures of one step, micro-batch by micro-batch.

    Attributes:
        loss: L_{S_j}(w), shape (m,).
        perturbed_loss: L_{S_j}(w + eps_j), shape (m,).
        gradient_norms: ||g_j||, shape (m,), of the gradient that the perturbation follows: half of the micro-batch's,
            the last step's in a chained ascent, T g_j under ASAM.
        perturbation_norms: ||eps_j||, shape (m,): rho each, unless a gradient vanishes, ASAM scales, groups have radii
            of their own, or a chained ascent has no direction yet (0).
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
        gradient_change: ||engine's gradient - the same without perturbation|| / ||the latter||, with the same masks.
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
    if is_sharded(optimizer.model):
        raise ValueError("model: a sharded model cannot be looked at in weight space; use `record` after a step")
    trainable = optimizer.trainable()
    with optimizer.engines.rehearsal(trainable):
        yield trainable


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
    """Both passes of every micro-batch as in the next step that perturbs, without updating anything.

    Args:
        optimizer: Whose options and number of steps say how the batch is cut and how far it perturbs.
        loss_fn: Mean loss of a (micro-)batch.
        batch: Tree of tensors, examples first.

    Returns:
        Figures of every micro-batch.
    """
    with undisturbed(optimizer):
        _, tracked, parts, shares = _plan(optimizer, batch)
        early, late, norms, sizes, gradients = [], [], [], [], []
        for slot, part in enumerate(parts):
            generators = Generators({p.device for p in tracked.parameters})
            loss, gradient = differentiate(loss_fn, part, tracked.parameters)
            generators.rewind()
            steps, norm = _ascent(optimizer, loss_fn, part, tracked, slot)
            generators.rewind()
            with moved(tracked.parameters, steps), torch.no_grad():
                late.append(float(loss_fn(part)))
            early.append(float(loss))
            norms.append(float(norm))
            sizes.append(float(size_of(steps)))
            gradients.append(torch.cat([g.flatten() for g in gradient]))
        mean = torch.stack([s * g for s, g in zip(shares, gradients, strict=True)]).sum(0)
        cosines = [float(torch.nn.functional.cosine_similarity(g, mean, dim=0)) for g in gradients]
        return Explanation(tuple(early), tuple(late), tuple(norms), tuple(sizes), tuple(cosines))


def check(optimizer: MSAM, loss_fn: Callable[[Any], Tensor], batch: Any) -> Check:
    """Prove that the perturbation happens: a dry run of the engine against one without perturbation and brute force.

    A chained ascent follows the gradients of the last step: before the first one there is nothing to prove, and the
    report says so with a perturbation of norm 0.

    Args:
        optimizer: An optimizer about to be used, or in use; it perturbs as in its next step that does.
        loss_fn: Mean loss of a (micro-)batch.
        batch: Tree of tensors, examples first.

    Returns:
        The figures it compared.

    Raises:
        RuntimeError: If rho > 0 and the perturbation changes the gradient by no more than rounding (relatively
            `eps ** 0.75` of the parameters' dtype), so that training would be plain; or if the engine's gradient is off
            by more than `eps ** 0.5` of the coarsest dtype in the graph.
    """
    told = explain(optimizer, loss_fn, batch)
    with undisturbed(optimizer) as trainable:
        shards, tracked, parts, shares = _plan(optimizer, batch)
        generators = Generators({p.device for p in trainable})
        brute = [torch.zeros_like(p) for p in trainable]
        with saved_dtypes() as dtypes:
            for slot, (part, share) in enumerate(zip(parts, shares, strict=True)):
                steps, _ = _ascent(optimizer, loss_fn, part, tracked, slot)
                with moved(tracked.parameters, steps):
                    torch._foreach_add_(brute, differentiate(loss_fn, part, trainable)[1], alpha=share)
        mode, engine = _dry_run(optimizer, loss_fn, batch, shards, tracked, generators)
        _, plain = _dry_run(optimizer, loss_fn, batch, shards, tracked.shrunk(), generators)
        size = float(norm_of(plain))
        change = float(norm_of(torch._foreach_sub(engine, plain))) / max(size, 1e-30)
        error = float(norm_of(torch._foreach_sub(engine, brute))) / max(float(norm_of(brute)), 1e-30)
        random = len({float(differentiate(loss_fn, parts[0], trainable)[0]) for _ in range(2)}) > 1
    mean_gap = sum(s * g for s, g in zip(shares, told.sharpness_gaps, strict=True))
    radius = sum(told.perturbation_norms) / len(told.perturbation_norms)
    own = {p.dtype for p in tracked.parameters}
    waiting = optimizer.options.ascent == "chained" and not optimizer.engines.chain.links
    if max(tracked.radii) > 0 and size > 0 and not waiting and change <= (floor := _eps(own) ** 0.75):
        raise RuntimeError(
            f"msam: the perturbation changes nothing (||eps|| = {radius:.3g}, relative change of the gradient "
            f"{change:.3g}, rounding {floor:.3g}); training would be plain"
        )
    if not random and error > (ceiling := _eps(own | dtypes) ** 0.5):
        raise RuntimeError(
            f"msam: the gradient of the {mode} engine is off by {error:.3g} of the definition's (rounding allows "
            f"{ceiling:.3g})"
        )
    return Check(mode, radius, mean_gap, change, None if random else error)


@contextmanager
def saved_dtypes() -> Iterator[set[torch.dtype]]:
    """Find out in which precision losses are computed, which autocast hides from their results.

    Yields:
        Floating dtypes of what the block's graphs save for their backward passes.
    """
    found: set[torch.dtype] = set()

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.add(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def _eps(dtypes: set[torch.dtype]) -> float:
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _ascent(
    optimizer: MSAM, loss_fn: Callable[[Any], Tensor], part: Any, tracked: Tracked, slot: int
) -> tuple[list[Tensor | None], Tensor]:
    """The perturbation of one micro-batch by the definition, as `perturbation` returns it."""
    if optimizer.options.ascent == "chained":
        return optimizer.engines.sequential(optimizer.trainable).chained(tracked, slot)
    return perturbation(tracked, differentiate(loss_fn, ascent_part(optimizer, part), tracked.parameters)[1])


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


def _plan(optimizer: MSAM, batch: Any) -> tuple[Shards, Tracked, list[Any], tuple[float, ...]]:
    options = optimizer.options
    shards = cut(batch_size(batch), options.num_micro_batches, options.micro_batch_size)
    parts = shards.parts(batch)
    return shards, optimizer.reach(shards.count), parts, shard_shares(batch, shards, options)


def _dry_run(
    optimizer: MSAM,
    loss_fn: Callable[[Any], Tensor],
    batch: Any,
    shards: Shards,
    tracked: Tracked,
    generators: Generators,
) -> tuple[str, list[Tensor]]:
    """The engine's own gradient, from the same random state at every call.

    Returns:
        Name of the engine, and its gradients.
    """
    trainable = optimizer.trainable()
    for p in trainable:
        p.grad = None
    generators.rewind()
    record = optimizer.engines.perturbed(loss_fn, batch, shards, tracked, optimizer.trainable)
    return record.mode, [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
