r"""mSAM one micro-batch at a time: perturb the weights, differentiate there, put them back.

$$ g = \sum_j \frac{n_j}{n} \nabla L_{S_j}(w + \epsilon_j),
\qquad \epsilon_j = \rho \frac{\nabla L_{S_j}(w)}{\|\nabla L_{S_j}(w)\|} $$

Memory is that of one micro-batch: the micro-batches are accumulation steps. Source: arXiv 2302.09693, section 3;
micro-batches of unequal weight n_j are a Departure (the paper's are equal), which makes m = 1 and a batch that m does
not divide consistent.
"""

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from msam.step.batches import Shards, narrow
from msam.step.checks import check_loss
from msam.step.options import Options
from msam.step.passes import Generators, norm_layers, statistics, unsynchronised
from msam.step.perturbation import Moved, Tracked, norm_of, perturbation, size_of
from msam.step.record import StepRecord

LossFunction = Callable[[Any], Tensor]
Scale = Callable[[Tensor], Tensor]


class GradientDrawer:
    """Lays the accumulated gradients aside, so that one pass can leave its own in `.grad`.

    Args:
        parameters: All parameters with gradients.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._aside = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None

    def close(self) -> None:
        """Put the gradients back that were laid aside; what the pass left is dropped."""
        for p, grad in zip(self._parameters, self._aside, strict=True):
            p.grad = grad


def take_gradients(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that a pass left.

    Args:
        parameters: The parameters.

    Returns:
        Their gradients, or None.

    Raises:
        ValueError: If no parameter got a gradient.
    """
    gradients = [p.grad for p in parameters]
    if all(g is None for g in gradients):
        raise ValueError(
            "loss: expected gradients for the perturbed parameters, got none (no backward, or no link to them)"
        )
    return gradients


def poison(parameters: Sequence[Tensor]) -> None:
    """Make the accumulated gradient infinite, so that a GradScaler skips the update and lowers its scale.

    Args:
        parameters: The perturbed parameters.
    """
    first = parameters[0]
    first.grad = torch.full_like(first, torch.inf)


class Sequential:
    """The sequential engine of one model.

    Args:
        model: The model whose buffers and wrappers the passes respect.
        options: mSAM's options.
        trainable: All parameters with gradients.
    """

    def __init__(self, model: nn.Module, options: Options, trainable: Sequence[Tensor]) -> None:
        self._model = model
        self._options = options
        self.trainable = trainable
        self._norms = norm_layers(model)
        self._devices = {p.device for p in trainable}
        self.previous: list[list[Tensor]] = []  # chained ascent: every slot's gradient of the last step

    def retrain(self, trainable: Sequence[Tensor]) -> None:
        """Take note of the parameters with gradients; slots of a chained ascent with other ones are void.

        Args:
            trainable: All parameters with gradients.
        """
        if len(trainable) != len(self.trainable) or not all(map(operator.is_, trainable, self.trainable)):
            self.trainable, self.previous = trainable, []

    def chained(self, tracked: Tracked, slot: int) -> tuple[list[Tensor | None], Tensor]:
        """The perturbation of a chained ascent.

        Args:
            tracked: What is perturbed, and how far.
            slot: The micro-batch j.

        Returns:
            As `perturbation` of the slot's gradient in the last step; nothing moves before there was one.
        """
        if slot >= len(self.previous):
            return [None] * len(tracked.parameters), torch.zeros(())
        last = dict(zip(map(id, self.trainable), self.previous[slot], strict=True))
        return perturbation(tracked, [last[id(p)].clone() for p in tracked.parameters])

    def accumulate(
        self, loss_fn: LossFunction, batch: Any, shards: Shards, tracked: Tracked, *, scale: Scale | None, weight: float
    ) -> StepRecord:
        """Add the weighted mSAM gradient of a batch to `.grad`.

        Args:
            loss_fn: Mean loss of a micro-batch.
            batch: Tree of tensors, examples first.
            shards: How it is cut.
            tracked: What is perturbed, and how far.
            scale: GradScaler's scaling of a loss, or None.
            weight: Factor of this batch's gradient.

        Returns:
            The step's record.
        """
        parts = shards.parts(batch)
        shares = shard_shares(parts, shards, self._options)
        weights, norms, sizes = Moved(tracked.parameters), [], []
        losses, perturbed, skipped = [], [], False
        for j, (part, share) in enumerate(zip(parts, shares, strict=True)):
            generators = Generators(self._devices)
            steps, norm, loss = self._ascend(loss_fn, part, shards.sizes[j], tracked, scale, j)
            if not tracked.uniform:
                sizes.append(size_of(steps))
            skipped = skipped or (scale is not None and not math.isfinite(norm))
            if skipped:
                losses.append(torch.zeros(()) if loss is None else loss)
                perturbed.append(losses[-1])
                norms.append(norm)
                continue
            try:
                weights.move(steps)
                if loss is not None and self._options.rng == "same":
                    generators.rewind()
                late = self._descend(loss_fn, part, share * weight, scale, j, last=j == shards.count - 1)
            finally:
                weights.restore()
            losses.append(late if loss is None else loss)
            perturbed.append(late)
            norms.append(norm)
        if skipped:
            poison(tracked.parameters)
        own = torch.stack(norms).detach()
        if scale is not None and self._options.ascent != "chained":  # kept gradients are without scale already
            own = own / scale(own.new_ones(()))
        return StepRecord(
            "sequential", tracked.radii[0], mean_of(losses, shares), mean_of(perturbed, shares), own, skipped,
            torch.stack(sizes) if sizes else None,
        )  # fmt: skip

    def plain(self, loss_fn: LossFunction, batch: Any, shards: Shards, *, scale: Scale | None, weight: float) -> Tensor:
        """Add the weighted plain gradient of a batch to `.grad`, one micro-batch at a time.

        Args:
            loss_fn: Mean loss of a micro-batch.
            batch: Tree of tensors, examples first.
            shards: How it is cut.
            scale: GradScaler's scaling of a loss, or None.
            weight: Factor of this batch's gradient.

        Returns:
            The mean loss, scalar tensor.
        """
        parts = shards.parts(batch)
        shares, losses = shard_shares(parts, shards, self._options), []
        for j, (part, share) in enumerate(zip(parts, shares, strict=True)):
            with (
                unsynchronised(self._model) if j < shards.count - 1 else nullcontext(),
                statistics(self._norms, self._options.bn, first=True),
            ):
                loss = check_loss(loss_fn(part), self._options.check_finite and scale is None)
                backward(loss, scale, factor=share * weight)
            losses.append(loss.detach())
        return mean_of(losses, shares)

    def _ascend(
        self, loss_fn: LossFunction, part: Any, size: int, tracked: Tracked, scale: Scale | None, slot: int
    ) -> tuple[list[Tensor | None], Tensor, Tensor | None]:
        if self._options.ascent == "chained":
            return *self.chained(tracked, slot), None
        if self._options.ascent == "half":
            part = narrow(part, 0, -(-size // 2))
        drawer = GradientDrawer(self.trainable)
        try:
            with unsynchronised(self._model), statistics(self._norms, self._options.bn, first=True):
                loss = check_loss(loss_fn(part), self._options.check_finite and scale is None)
                only = None if len(tracked.parameters) == len(self.trainable) else list(tracked.parameters)
                backward(loss, scale, only)
            steps, norm = perturbation(tracked, take_gradients(tracked.parameters))
        finally:
            drawer.close()
        if scale is None and self._options.check_finite and not math.isfinite(norm):
            raise ValueError(f"loss: expected a finite gradient, got norm {float(norm)} in micro-batch {slot}")
        return steps, norm, loss.detach()

    def _descend(
        self, loss_fn: LossFunction, part: Any, share: float, scale: Scale | None, slot: int, last: bool
    ) -> Tensor:
        chained = self._options.ascent == "chained"
        drawer = GradientDrawer(self.trainable) if chained else None
        # A chained step has a single pass, which then moves the statistics.
        with (
            nullcontext() if last else unsynchronised(self._model),
            statistics(self._norms, self._options.bn, first=chained),
        ):
            loss = check_loss(loss_fn(part), self._options.check_finite and scale is None)
            backward(loss, scale, factor=share)
        if drawer is not None:
            self._keep(slot, share if scale is None else scale(loss.new_full((), share)))
            own = [p.grad for p in self.trainable]
            drawer.close()
            for p, g in zip(self.trainable, own, strict=True):
                p.grad = g if p.grad is None else p.grad if g is None else p.grad + g
        return loss.detach()

    def _keep(self, slot: int, factor: float | Tensor) -> None:
        """Note the slot's own gradient for the next step, without the factor that its loss was multiplied with."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.detach() / factor for p in self.trainable]
        if math.isfinite(norm_of(gradients)):
            self.previous[slot : slot + 1] = [gradients]


def shard_shares(parts: Sequence[Any], shards: Shards, options: Options) -> list[float]:
    """Shares n_j / n of the micro-batches in the mean loss.

    Args:
        parts: The micro-batches.
        shards: Their sizes.
        options: Whose `shard_weight` weighs a micro-batch; without it examples count.

    Returns:
        Non-negative shares that sum to 1.

    Raises:
        ValueError: If the weights are negative, not finite, or all zero.
    """
    weigh = options.shard_weight
    weights = [float(size) for size in shards.sizes] if weigh is None else [float(weigh(part)) for part in parts]
    total = sum(weights)
    if not (min(weights) >= 0 and 0 < total < float("inf")):
        raise ValueError(f"shard_weight: expected weights >= 0 with a positive sum, got {weights}")
    return [w / total for w in weights]


def backward(loss: Tensor, scale: Scale | None, only: list[Tensor] | None = None, factor: float = 1.0) -> None:
    """Differentiate a loss, scaled as a GradScaler asks.

    Args:
        loss: Scalar tensor.
        scale: Scaling, or None.
        only: Parameters that get gradients; None for all.
        factor: Factor of the loss.
    """
    weighted = loss if factor == 1.0 else loss * factor
    torch.autograd.backward(weighted if scale is None else scale(weighted), inputs=only)


def mean_of(terms: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Weighted mean of scalar tensors.

    Args:
        terms: At least one scalar, without graph.
        shares: Their weights, which sum to 1.

    Returns:
        Scalar tensor.
    """
    if len(terms) == 1:
        return terms[0]
    values = torch.stack(list(terms))
    return (values * values.new_tensor(shares)).sum()
