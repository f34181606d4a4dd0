"""The ghost engine: both passes of all micro-batches at once, each out of reach of the others."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from msam.engines.ghost.directions import Plan
from msam.engines.ghost.errors import UnsupportedError
from msam.engines.ghost.sharded import sharded
from msam.engines.ghost.tape import Tape
from msam.engines.ghost.uses.rules import RULES
from msam.engines.sequential import Piece, Stretch, backward, poison, taken
from msam.step.batches import halves
from msam.step.chain import Chain
from msam.step.checks import check_finite_loss, check_finite_norms
from msam.step.gradients import Gradients
from msam.step.options import Options
from msam.step.passes import Generators, is_sharded, norm_layers, remembered, statistics, unsynchronised
from msam.step.perturbation import Tracked
from msam.step.state import State

LossFunction = Callable[[Any], Tensor]
Scale = Callable[[Tensor], Tensor]


class Ghost:
    """The ghost engine of one model.

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
        self._devices = {p.device for p in trainable}
        self._norms = norm_layers(model)
        self._sharded = any(map(is_sharded, model.modules()))
        self._seen = False  # whether a pass has ended well
        self._told = False

    def accumulate(
        self, loss_fn: LossFunction, stretch: Stretch, tracked: Tracked, *, scale: Scale | None, weight: float
    ) -> Piece:
        """Add the weighted mSAM gradient of a stretch of micro-batches to `.grad`; the parameters are never written.

        Args:
            loss_fn: Mean loss of a (micro-)batch.
            stretch: Micro-batches of one size.
            tracked: What is perturbed, and how far.
            scale: GradScaler's scaling of a loss, or None.
            weight: Factor of the gradient.

        Returns:
            What to record of it.

        Raises:
            UnsupportedError: If ghost mode cannot follow the loss exactly; nothing has been accumulated then.
            ValueError: If a gradient is not finite and no GradScaler would notice.
        """
        generators, state = Generators(self._devices), State(self._model, copies=not self._seen)
        restore = remembered(self._norms)
        # Compiled code would keep its uses of parameters out of sight.
        uncompiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        try:
            self._refuse_odd(state, tracked)
            with uncompiled:
                if self._options.ascent == "chained":
                    return self._single_pass(loss_fn, stretch, tracked, scale, weight, state)
                return self._both_passes(loss_fn, stretch, tracked, scale, weight, generators, state)
        except UnsupportedError:
            restore()
            state.restore()
            generators.rewind()  # the fallback draws the same numbers
            raise

    def _both_passes(
        self, loss_fn: LossFunction, stretch: Stretch, tracked: Tracked, scale: Scale | None, weight: float,
        generators: Generators, state: State,
    ) -> Piece:  # fmt: skip
        # 1. the directions
        with self._around(stretch, first=True):
            plan, early = self._ascend(loss_fn, stretch, tracked, scale)
        factor = 1.0 if scale is None else float(scale(torch.ones((), device=early.device)))
        norms = [norm / factor for norm in plan.norms]
        told = plan.per_micro_batch(norms)
        if scale is not None and not all(map(math.isfinite, norms)):
            poison(tracked.parameters)
            return Piece("ghost", early, early, told, skipped=True)
        if scale is None and self._options.check_finite:
            check_finite_norms(norms)
        # 2. the gradients there
        if self._options.rng == "same":
            generators.rewind()
        tape = Tape(_index_of(tracked), stretch.count, RULES, plan)
        late = self._descend(tape, loss_fn, stretch, tracked, scale, weight, state)
        return Piece("ghost", early, late, told)

    def _single_pass(
        self, loss_fn: LossFunction, stretch: Stretch, tracked: Tracked, scale: Scale | None, weight: float,
        state: State,
    ) -> Piece:  # fmt: skip
        """A step of a chained ascent: the last step's gradients are the directions, this one's those of the next."""
        plan, told = self._followed(stretch, tracked)
        tape = Tape(_index_of(tracked), stretch.count, RULES, plan, keep=True)
        late = self._descend(tape, loss_fn, stretch, tracked, scale, weight, state)
        factor = weight if scale is None else weight * float(scale(torch.ones((), device=late.device)))
        assert tape.found is not None
        self._chain.put(stretch.first, tape.found, [factor * share or 1.0 for share in stretch.shares])
        return Piece("ghost", late, late, told)

    def _followed(self, stretch: Stretch, tracked: Tracked) -> tuple[Plan, Tensor]:
        """Directions along the gradients of the last step, and the norms of these, shape (m,)."""
        self._chain.follow(tracked.parameters)
        gradients, weights = self._chain.take(stretch.first, stretch.count)
        plan = Plan(tracked, gradients)
        plan.finish()
        lost = [j for j, norm in enumerate(plan.norms) if not math.isfinite(norm)]
        if lost:  # as after a step that a GradScaler has skipped
            gradients, _ = self._chain.take(stretch.first, stretch.count)
            plan = Plan(tracked, gradients.without(lost))
            plan.finish()
        return plan, plan.per_micro_batch([norm / factor for norm, factor in zip(plan.norms, weights, strict=True)])

    def _descend(
        self, tape: Tape, loss_fn: LossFunction, stretch: Stretch, tracked: Tracked, scale: Scale | None,
        weight: float, state: State,
    ) -> Tensor:  # fmt: skip
        """The pass whose gradients are accumulated.

        Returns:
            The stretch's part in the mean loss.
        """
        alone, gathered = tape.found is not None, None
        with self._around(stretch, first=alone, synchronised=True):
            losses = self._run(tape, loss_fn, stretch.batch, stretch.size, tracked, first=alone)
            loss = stretch.mean(losses)
            if alone:
                if self._options.check_finite and scale is None:
                    check_finite_loss(loss)
                self._refuse_hidden_uses(loss, tape)
                gathered = tape.listen()
            self._refuse_writes(state)
            if tape.plan is not None:
                tape.plan.release()
            if alone:
                self._chain.drop(stretch.first, stretch.count)
            self._seen = True
            with nullcontext() if stretch.last else unsynchronised(self._model):
                backward(loss, scale, factor=weight)
            if gathered is not None:
                gathered()
        return loss.detach()

    def _run(
        self, tape: Tape, loss_fn: LossFunction, batch: Any, size: int, tracked: Tracked, first: bool
    ) -> Tensor:  # fmt: skip
        """The losses of a pass; in the first one, what has to be said about them."""
        tape.watching = first and not self._seen and "torch._dynamo" in sys.modules
        losses = tape.run(loss_fn, batch, size, self._sharding(tape, tracked))
        if tape.compiled:
            warnings.warn(
                "msam: ghost mode runs compiled code uncompiled; mode='sequential' keeps it compiled", stacklevel=8
            )
        if first and tape.uneven and self._options.shard_weight is None and not self._told:
            self._told = True
            warnings.warn(
                "msam: micro-batches have unequal numbers of valid targets, and weigh by their examples all the same; "
                "give shard_weight (such as the number of valid targets) for the mean over all of them",
                stacklevel=8,
            )
        return losses

    def _ascend(
        self, loss_fn: LossFunction, stretch: Stretch, tracked: Tracked, scale: Scale | None
    ) -> tuple[Plan, Tensor]:
        """Pass 1: forward, backward to activations only, and the directions that follow."""
        batch, size = stretch.batch, stretch.size
        if self._options.ascent == "half":
            batch, size = halves(batch, stretch.count, size), -(-size // 2)
        tape = Tape(_index_of(tracked), stretch.count, RULES)
        losses = self._run(tape, loss_fn, batch, size, tracked, first=True)
        total = losses.sum()  # whose gradients are those of every micro-batch
        if self._options.check_finite and scale is None:
            check_finite_loss(total)
        targets = [use.target for use in tape.uses]
        # Parameters reached without the tape, as by a custom autograd function, would be perturbed by nobody.
        gradients = _gradients(total if scale is None else scale(total), [*targets, *tracked.parameters])
        for parameter, gradient in zip(tracked.parameters, gradients[len(targets) :], strict=True):
            if gradient is not None:
                self._refuse_hidden(parameter)
        taken(gradients)
        found = Gradients(stretch.count)
        for use, gradient in zip(tape.uses, gradients, strict=False):
            if gradient is not None:
                use.contribute(found, gradient)
        plan = Plan(tracked, found, kept=tape.kept if self._options.ascent != "half" else {})
        plan.finish()
        return plan, stretch.mean(losses.detach())

    def _sharding(self, tape: Tape, tracked: Tracked) -> AbstractContextManager[None]:
        """What FSDP2 needs around a pass."""
        if not self._sharded:
            return nullcontext()
        index = _index_of(tracked)
        names = {name: index[id(p)] for name, p in self._model.named_parameters() if id(p) in index}
        return sharded(self._model, tape, names)

    def _name_of(self, parameter: Tensor) -> str:
        names = [name for name, p in self._model.named_parameters() if p is parameter]
        return f"parameter {names[0]}" if names else f"a parameter of shape {tuple(parameter.shape)}"

    def _refuse_odd(self, state: State, tracked: Tracked) -> None:
        """Refuse complex parameters, and hooks on gradients, which have to see each micro-batch's own."""
        if state.hooked:
            raise UnsupportedError(f"{state.hooked} has a backward hook, which ghost mode would not call")
        for parameter in tracked.parameters:
            if parameter.is_complex():
                raise UnsupportedError(f"{self._name_of(parameter)} is complex")
            if parameter._backward_hooks:
                raise UnsupportedError(
                    f"{self._name_of(parameter)} has a gradient hook, which would see no micro-batch's own gradient"
                )

    def _refuse_hidden(self, parameter: Tensor) -> None:
        raise UnsupportedError(f"{self._name_of(parameter)} is used out of sight, as by a custom autograd function")

    def _refuse_hidden_uses(self, loss: Tensor, tape: Tape) -> None:
        """The same for a single pass, in which parameters themselves are in the graph."""
        seen, waiting = set[Any](), list[Any]([loss.grad_fn])
        while waiting:
            node = waiting.pop()
            ours = node in tape.ours
            for following, _ in node.next_functions:
                if following is None:
                    continue
                leaf = getattr(following, "variable", None)
                if leaf is None:
                    if following not in seen:
                        seen.add(following)
                        waiting.append(following)
                elif not ours and tape.find(leaf) is not None:
                    self._refuse_hidden(leaf)

    def _refuse_writes(self, state: State) -> None:
        changed = state.changed()
        if changed:
            raise UnsupportedError(
                f"the loss writes {', '.join(changed[:3])} of the model, which would happen once for all micro-batches"
            )

    def _around(self, stretch: Stretch, first: bool, synchronised: bool = False) -> AbstractContextManager[object]:
        """What must hold around a pass."""
        alone = nullcontext() if synchronised else unsynchronised(self._model)
        if not self._norms:
            return alone
        with ExitStack() as stack:
            stack.enter_context(alone)
            stack.enter_context(statistics(self._norms, self._options.bn, first=first))
            stack.enter_context(_counted(self._norms, stretch.count))
            return stack.pop_all()


def _index_of(tracked: Tracked) -> dict[int, int]:
    return {id(p): i for i, p in enumerate(tracked.parameters)}


def _gradients(loss: Tensor, targets: Sequence[Any]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss, targets, allow_unused=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"the loss cannot be differentiated for all micro-batches at once ({reason})") from error


@contextmanager
def _counted(norms: Sequence[_NormBase], micro_batches: int) -> Iterator[None]:
    """Let batch norms count every micro-batch, as they do when these come one by one."""
    if micro_batches > 1 and any(m.momentum is None for m in norms if m.training and m.track_running_stats):
        raise UnsupportedError("a batch norm has a cumulative average (momentum=None)")
    counters = [m.num_batches_tracked for m in norms if m.training and m.num_batches_tracked is not None]
    before = [c.clone() for c in counters]
    yield
    for counter, value in zip(counters, before, strict=True):
        counter.copy_(value + micro_batches * (counter - value))
