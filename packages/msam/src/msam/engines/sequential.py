r"""mSAM one micro-batch at a time: perturb the weights, differentiate there, put them back.

$$ g = \sum_j \frac{n_j}{n} \nabla L_{S_j}(w + \epsilon_j),
\qquad \epsilon_j = \rho \frac{\nabla L_{S_j}(w)}{\|\nabla L_{S_j}(w)\|} $$

Memory is that of one micro-batch: the micro-batches are accumulation steps. Source: arXiv 2302.09693, section 3;
micro-batches of unequal weight n_j are a Departure (the paper's are equal), which makes m = 1 and a batch that m does
not divide consistent.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from msam.step.batches import Shards, constant, narrow
from msam.step.chain import Chain
from msam.step.checks import check_loss
from msam.step.gradients import Gradients
from msam.step.options import Options
from msam.step.passes import Generators, norm_layers, statistics, unsynchronised
from msam.step.perturbation import Moved, Tracked, norm_of, perturbation, size_of
from msam.step.state import State

LossFunction = Callable[[Any], Tensor]
Scale = Callable[[Tensor], Tensor]


class GradientDrawer:
    """Lays the accumulated gradients aside, so that one pass can leave its own in `.grad`.

    Args:
        parameters: Whose gradients.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._aside: list[tuple[Tensor, Tensor | None]] = []
        self.add(parameters)

    def add(self, parameters: Sequence[Tensor]) -> None:
        """Lay the gradients of further parameters aside.

        Args:
            parameters: None of them laid aside yet.
        """
        for p in parameters:
            self._aside.append((p, p.grad))
            p.grad = None

    def close(self) -> None:
        """Put the gradients back that were laid aside; what the pass left is dropped."""
        for p, grad in self._aside:
            p.grad = grad
        self._aside = []


def taken(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients that a pass has found for the perturbed parameters.

    Args:
        gradients: One per parameter, or None.

    Returns:
        The same.

    Raises:
        ValueError: If no parameter got a gradient.
    """
    if all(g is None for g in gradients):
        raise ValueError(
            "loss: expected gradients for the perturbed parameters, got none (no backward, or no link to them)"
        )
    return list(gradients)


def reached(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """All leaves that a backward pass may write gradients to: those of the graph, and of the model.

    The latter because reentrant checkpointing hides leaves from the graph.

    Args:
        loss: Where the backward pass starts.
        model: The model.

    Returns:
        The leaves, each once.
    """
    found: dict[int, Tensor] = {id(p): p for p in model.parameters() if p.requires_grad}
    for node in nodes_of(loss):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
    return list(found.values())


def nodes_of(loss: Tensor) -> list[Any]:
    """All nodes of the graph of a loss.

    Args:
        loss: A tensor.

    Returns:
        The nodes, each once.
    """
    seen, waiting = dict[Any, None](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen[node] = None
            waiting += [following for following, _ in node.next_functions]
    return list(seen)


@contextmanager
def noticed(
    model: nn.Module, trainable: Sequence[Tensor], lay_aside: Callable[[list[Tensor]], object]
) -> Iterator[list[float]]:
    """Tell of parameters outside the optimizer before a backward pass in the block writes their gradients.

    `Tensor.backward` goes through `torch.autograd.backward`, which stands aside for the time of the block: nothing else
    knows which leaves a loss has before they are written.

    Args:
        model: The model.
        trainable: The optimizer's parameters.
        lay_aside: Takes the leaves that a pass will write and no earlier one in the block has.

    Yields:
        A list of the seconds that looking for leaves takes, as they are spent.
    """
    known, spent = set(map(id, trainable)), list[float]()
    backward = torch.autograd.backward

    def watched(tensors: Any, *args: Any, **kwargs: Any) -> None:
        start = time.process_time()
        losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        found = {id(p): p for loss in losses if loss.grad_fn is not None for p in reached(loss, model)}
        lay_aside([p for key, p in found.items() if key not in known])
        known.update(found)
        spent.append(time.process_time() - start)
        backward(tensors, *args, **kwargs)

    torch.autograd.backward = watched
    try:
        yield spent
    finally:
        torch.autograd.backward = backward


def poison(parameters: Sequence[Tensor]) -> None:
    """Make the accumulated gradient infinite, so that a GradScaler skips the update and lowers its scale.

    Args:
        parameters: The perturbed parameters.
    """
    first = parameters[0]
    first.grad = torch.full_like(first, torch.inf)


@dataclass(frozen=True)
class Stretch:
    """Consecutive micro-batches of one size.

    Attributes:
        batch: Their examples.
        first: Which micro-batch of the step the first one is.
        count: How many they are.
        size: Examples of each.
        shares: Share of each in the mean loss of the step.
        last: Whether no micro-batch of the step comes after them.
    """

    batch: Any
    first: int
    count: int
    size: int
    shares: tuple[float, ...]
    last: bool

    def mean(self, losses: Tensor) -> Tensor:
        """Its part in the mean loss of the step, of the losses of its micro-batches, shape (m,)."""
        if self.count == 1 and self.shares[0] == 1.0:
            return losses[0]
        return torch.dot(losses, constant(self.shares, losses.dtype, losses.device))

    def parts(self) -> list[Any]:
        """The micro-batches, as views."""
        return Shards((self.size,) * self.count).parts(self.batch)

    def split(self, lengths: Sequence[int]) -> list["Stretch"]:
        """The stretch as several, one after the other, of so many micro-batches each."""
        found, start = [], 0
        for n in lengths:
            part, stop = narrow(self.batch, start * self.size, n * self.size), start + n
            last = self.last and stop == self.count
            found.append(Stretch(part, self.first + start, n, self.size, self.shares[start:stop], last))
            start = stop
        return found


def stretches(batch: Any, shards: Shards, options: Options) -> list[Stretch]:
    """Cut a batch into stretches of equal micro-batches.

    Args:
        batch: Tree of tensors, examples first.
        shards: How it is cut.
        options: Whose `shard_weight` and `reduction` weigh a micro-batch.

    Returns:
        One or two stretches, as a rule.
    """
    shares = shard_shares(batch, shards, options)
    found = []
    for first, count, size in shards.runs:
        part = batch if count == shards.count else narrow(batch, shards.starts[first], count * size)
        found.append(Stretch(part, first, count, size, shares[first : first + count], first + count == shards.count))
    return found


@dataclass(frozen=True)
class Piece:
    """What an engine tells of one stretch.

    Attributes:
        mode: The engine.
        loss: The stretch's part in the mean loss at the weights, scalar tensor.
        perturbed_loss: At the perturbed weights.
        norms: ||g_j||, shape (m,).
        sizes: ||eps_j||, shape (m,), where it is not rho throughout and known.
        skipped: Whether an infinite gradient under a GradScaler has made the step void.
    """

    mode: str
    loss: Tensor
    perturbed_loss: Tensor
    norms: Tensor
    sizes: Tensor | None = None
    skipped: bool = False


class Sequential:
    """The sequential engine of one model.

    Args:
        model: The model whose buffers and wrappers the passes respect.
        options: mSAM's options.
        trainable: All parameters with gradients.
        chain: What a chained ascent hands from step to step.
    """

    def __init__(self, model: nn.Module, options: Options, trainable: Sequence[Tensor], chain: Chain) -> None:
        self._model = model
        self._options = options
        self._chain = chain
        self.trainable = trainable
        self._norms = norm_layers(model)
        self._devices = {p.device for p in trainable}
        self._reentrant: bool | None = None  # whether the first loss went through reentrant checkpointing

    def chained(self, tracked: Tracked, slot: int) -> tuple[list[Tensor | None], Tensor]:
        """The perturbation of a chained ascent.

        Args:
            tracked: What is perturbed, and how far.
            slot: The micro-batch j.

        Returns:
            As `perturbation` of the slot's gradient in the last step; nothing moves before there was one.
        """
        self._chain.follow(tracked.parameters)
        gradients, weights = self._chain.take(slot, 1)
        whole = gradients.whole()
        last = [whole[i][0] / weights[0] if i in whole else None for i in range(len(tracked.parameters))]
        there = [g for g in last if g is not None]
        if not there or not math.isfinite(norm_of(there)):  # as after a step that a GradScaler has skipped
            return [None] * len(last), torch.zeros(())
        return perturbation(tracked, last)

    def accumulate(
        self, loss_fn: LossFunction, stretch: Stretch, tracked: Tracked, *, scale: Scale | None, weight: float
    ) -> Piece:
        """Add the weighted mSAM gradient of a stretch of micro-batches to `.grad`.

        Args:
            loss_fn: Mean loss of a micro-batch.
            stretch: Micro-batches of one size.
            tracked: What is perturbed, and how far.
            scale: GradScaler's scaling of a loss, or None.
            weight: Factor of the gradient.

        Returns:
            What to record of it.
        """
        weights, norms, sizes = Moved(tracked.parameters), [], []
        losses, perturbed, skipped = [], [], False
        for j, (part, share) in enumerate(zip(stretch.parts(), stretch.shares, strict=True)):
            generators, slot = Generators(self._devices), stretch.first + j
            before = None if self._options.ascent == "chained" else State(self._model)
            steps, norm, loss = self._ascend(loss_fn, part, stretch.size, tracked, scale, slot)
            if not tracked.uniform:
                sizes.append(size_of(steps))
            skipped = skipped or (scale is not None and not math.isfinite(norm))
            if skipped:
                losses.append(torch.zeros(()) if loss is None else loss)
                perturbed.append(losses[-1])
                norms.append(norm)
                continue
            after = None if before is None else State(self._model, before)
            try:
                weights.move(steps)
                if loss is not None and self._options.rng == "same":
                    generators.rewind()
                last = stretch.last and j == stretch.count - 1
                late = self._descend(loss_fn, part, tracked, share * weight, scale, slot, last=last)
            finally:
                weights.restore()
                if after is not None:
                    after.restore()
            losses.append(late if loss is None else loss)
            perturbed.append(late)
            norms.append(norm)
        if skipped:
            poison(tracked.parameters)
        own = torch.stack(norms).detach()
        if scale is not None and self._options.ascent != "chained":  # kept gradients are without scale already
            own = own / scale(own.new_ones(()))
        told = torch.stack(sizes) if sizes else None
        early, late = (stretch.mean(torch.stack(found)) for found in (losses, perturbed))
        return Piece("sequential", early, late, own, told, skipped)

    def plain(self, loss_fn: LossFunction, stretch: Stretch, *, scale: Scale | None, weight: float) -> Tensor:
        """Add the weighted plain gradient of a stretch to `.grad`, one micro-batch at a time.

        Args:
            loss_fn: Mean loss of a micro-batch.
            stretch: Micro-batches of one size.
            scale: GradScaler's scaling of a loss, or None.
            weight: Factor of the gradient.

        Returns:
            The losses, shape (m,).
        """
        losses = []
        for j, (part, share) in enumerate(zip(stretch.parts(), stretch.shares, strict=True)):
            last = stretch.last and j == stretch.count - 1
            with (
                nullcontext() if last else unsynchronised(self._model),
                statistics(self._norms, self._options.bn, first=True),
            ):
                loss = check_loss(loss_fn(part), self._options.check_finite and scale is None)
                backward(loss, scale, factor=share * weight)
            losses.append(loss.detach())
        return torch.stack(losses)

    def _ascend(
        self, loss_fn: LossFunction, part: Any, size: int, tracked: Tracked, scale: Scale | None, slot: int
    ) -> tuple[list[Tensor | None], Tensor, Tensor | None]:
        if self._options.ascent == "chained":
            return *self.chained(tracked, slot), None
        if self._options.ascent == "half":
            part = narrow(part, 0, -(-size // 2))
        with unsynchronised(self._model), statistics(self._norms, self._options.bn, first=True):
            loss = check_loss(loss_fn(part), self._options.check_finite and scale is None)
            gradients = self._gradients(loss if scale is None else scale(loss), tracked.parameters)
        steps, norm = perturbation(tracked, gradients)
        if scale is None and self._options.check_finite and not math.isfinite(norm):
            raise ValueError(f"loss: expected a finite gradient, got norm {float(norm)} in micro-batch {slot}")
        return steps, norm, loss.detach()

    def _gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradient of pass 1, which may touch nobody's `.grad`: some parameters are other optimizers'."""
        if self._reentrant is None:
            self._reentrant = any(type(n).__name__ == "CheckpointFunctionBackward" for n in nodes_of(loss))
        if not self._reentrant:
            return taken(torch.autograd.grad(loss, list(parameters), allow_unused=True))
        # falls back to a whole backward pass: the reentrant kind of checkpointing knows no other
        drawer = GradientDrawer(reached(loss, self._model))
        try:
            torch.autograd.backward(loss)
            return taken([p.grad for p in parameters])
        finally:
            drawer.close()

    def _descend(
        self, loss_fn: LossFunction, part: Any, tracked: Tracked, share: float, scale: Scale | None, slot: int,
        last: bool,
    ) -> Tensor:  # fmt: skip
        chained, own = self._options.ascent == "chained", dict[int, Tensor]()

        def hear(gradient: Tensor, i: int) -> None:
            # a copy, since `.grad` may take the memory over and add to it
            own[i] = gradient.detach().clone() if i not in own else own[i] + gradient.detach()

        # `.grad` holds the sum over micro-batches, which DDP reduces with the last of them.
        heard = enumerate(tracked.parameters if chained else ())
        handles = [p.register_hook(partial(hear, i=i)) for i, p in heard]
        try:
            # A chained step has a single pass, which then moves the statistics.
            with (
                nullcontext() if last else unsynchronised(self._model),
                statistics(self._norms, self._options.bn, first=chained),
            ):
                loss = check_loss(loss_fn(part), self._options.check_finite and scale is None)
                backward(loss, scale, factor=share)
        finally:
            for handle in handles:
                handle.remove()
        if chained:
            factor = share if scale is None else share * float(scale(loss.new_ones(())))
            self._chain.put(slot, Gradients(1, dense={i: g[None] for i, g in own.items()}), [factor or 1.0])
        return loss.detach()


def shard_shares(batch: Any, shards: Shards, options: Options) -> tuple[float, ...]:
    """Shares n_j / n of the micro-batches in the mean loss.

    Args:
        batch: Tree of tensors, examples first.
        shards: How it is cut.
        options: Whose `shard_weight` weighs a micro-batch; without it examples count. Sums of losses have no shares.

    Returns:
        Non-negative shares that sum to 1; ones if losses are sums.

    Raises:
        ValueError: If the weights are negative, not finite, or all zero.
    """
    if options.reduction == "sum":
        return (1.0,) * shards.count
    if options.shard_weight is None:
        return shards.shares
    weights = [float(options.shard_weight(part)) for part in shards.parts(batch)]
    total = sum(weights)
    if not (min(weights) >= 0 and 0 < total < float("inf")):
        raise ValueError(f"shard_weight: expected weights >= 0 with a positive sum, got {weights}")
    return tuple(w / total for w in weights)


def backward(loss: Tensor, scale: Scale | None, factor: float = 1.0) -> None:
    """Differentiate a loss, scaled as a GradScaler asks.

    Args:
        loss: Scalar tensor.
        scale: Scaling, or None.
        factor: Factor of the loss.
    """
    weighted = loss if factor == 1.0 else loss * factor
    torch.autograd.backward(weighted if scale is None else scale(weighted))
