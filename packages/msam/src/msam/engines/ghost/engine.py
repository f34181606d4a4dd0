"""The ghost engine: prove a model's path once, then run both passes over whole batches."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from msam.engines.ghost.capture import capture
from msam.engines.ghost.directions import Plan
from msam.engines.ghost.errors import ChangedError, NotFiniteError, UnsupportedError
from msam.engines.ghost.proof import prove
from msam.engines.ghost.table import Table
from msam.engines.ghost.tape import Path, Tape
from msam.engines.ghost.uses.rules import RULES
from msam.engines.sequential import Scale, backward, poison, shard_shares
from msam.step.batches import Shards, pick
from msam.step.checks import check_finite_norms, check_loss
from msam.step.options import Options
from msam.step.passes import Generators, is_sharded, norm_layers, statistics, undone, unsynchronised
from msam.step.perturbation import Tracked
from msam.step.record import StepRecord

LossFunction = Callable[[Any], Tensor]


class Ghost:
    """The ghost engine of one model.

    Args:
        model: The model whose buffers and wrappers the passes respect.
        options: mSAM's options.
        trainable: All parameters with gradients.
    """

    def __init__(self, model: nn.Module, options: Options, trainable: Sequence[Tensor]) -> None:
        self._model = model
        self._options = options
        self._devices = {p.device for p in trainable}
        self._paths: dict[bool, list[Path]] = {False: [], True: []}
        self._table: Table | None = None
        self._norms = norm_layers(model)
        self._parallel = isinstance(model, DistributedDataParallel) or is_sharded(model)
        self._compiled = False
        self._batches = 0  # since the last new path

    def accumulate(
        self, loss_fn: LossFunction, batch: Any, shards: Shards, tracked: Tracked, *, scale: Scale | None, weight: float
    ) -> StepRecord:
        """Add the weighted mSAM gradient of a batch to `.grad`; the parameters are never written.

        Args:
            loss_fn: Mean loss of a (micro-)batch.
            batch: Tree of tensors, examples first.
            shards: How it is cut.
            tracked: What is perturbed, and how far.
            scale: GradScaler's scaling of a loss, or None.
            weight: Factor of this batch's gradient.

        Returns:
            The step's record.

        Raises:
            UnsupportedError: If ghost mode cannot follow the model exactly; nothing has been accumulated then.
            ValueError: If a gradient is not finite and no GradScaler would notice.
        """
        if self._table is None or not self._table.holds(tracked.parameters):  # also after (un)freezing
            exact = self._options.ascent != "half"  # the passes of a half ascent see batches of two lengths
            self._table = Table(self._model, tracked.parameters, exact)
            self._paths = {False: [], True: []}
        self._batches += 1
        generators = Generators(self._devices)
        try:
            with undone(self._norms, UnsupportedError):
                return self._both_passes(loss_fn, batch, shards, tracked, scale, weight, generators)
        except UnsupportedError:
            generators.rewind()  # whatever stands in draws the same numbers
            raise

    def _both_passes(
        self, loss_fn: LossFunction, batch: Any, shards: Shards, tracked: Tracked, scale: Scale | None, weight: float,
        generators: Generators,
    ) -> StepRecord:  # fmt: skip
        plan, loss = self._first_pass(loss_fn, batch, shards, tracked, scale, generators)
        plan.finish()
        own = self._own_norms(plan.norms, batch, shards, scale, loss.device)
        norms = plan.per_micro_batch(own)
        if scale is not None and not all(map(math.isfinite, own)):
            poison(tracked.parameters)
            return StepRecord("ghost", tracked.radii[0], loss, loss, norms, skipped=True)
        if scale is None and self._options.check_finite:
            check_finite_norms(own)
        if self._options.rng == "same":
            generators.rewind()
        try:
            late = self._descend(loss_fn, batch, shards, plan, scale, weight)
        except ChangedError as error:
            raise UnsupportedError(f"the model takes another path in pass 2: {error}") from error
        return StepRecord("ghost", tracked.radii[0], loss, late, norms)

    def _own_norms(
        self, norms: Sequence[float], batch: Any, shards: Shards, scale: Scale | None, device: torch.device
    ) -> list[float]:
        """Norms of the micro-batches' own gradients: without their share in the whole loss and the loss scale.

        Returns:
            One per micro-batch.
        """
        if scale is not None:
            factor = float(scale(torch.ones((), device=device)))
            norms = [norm / factor for norm in norms]
        if self._options.shard_weight is None and len(shards.runs) == 1:
            return [norm * shards.count for norm in norms]
        batch, shards = self._ascent_part(batch, shards)
        parts = shards.parts(batch)
        shares = shard_shares(parts, shards, self._options)
        return [norm / max(share, 1e-30) for norm, share in zip(norms, shares, strict=True)]

    def _first_pass(
        self, loss_fn: LossFunction, batch: Any, shards: Shards, tracked: Tracked, scale: Scale | None,
        generators: Generators,
    ) -> tuple[Plan, Tensor]:  # fmt: skip
        """Pass 1, after a proof wherever the model's path is new.

        Returns:
            The plan, to be finished, and the detached loss.

        Raises:
            UnsupportedError: If the path is new again right after its proof, or cannot be proved.
            NotFiniteError: If it cannot because the first batch's loss or gradient is not finite.
        """
        known = bool(self._paths[shards.count > 1])
        if known and not self._proof_is_due(shards):
            try:
                return self._ascend(loss_fn, batch, shards, tracked, scale)
            except ChangedError:
                generators.rewind()
        try:
            self._prove(loss_fn, batch, shards, tracked, self._options.check_finite and scale is None)
        except NotFiniteError:
            if not known:
                raise
        generators.rewind()
        try:
            return self._ascend(loss_fn, batch, shards, tracked, scale)
        except ChangedError as error:
            raise UnsupportedError(f"the model takes another path at every call: {error}") from error

    def _proof_is_due(self, shards: Shards) -> bool:
        """Whether to prove known paths once more.

        With the 4th, 16th, 64th, ... batch after a new path, because a loss may show only then that it is no mean over
        micro-batches (a mask that was full at first), and at once where the first batches left a layout open.

        Returns:
            True if so.
        """
        n = self._batches
        fourfold = n & (n - 1) == 0 and n.bit_length() % 2 == 1
        return fourfold or (n < 32 and any(path.unsure for path in self._paths[shards.count > 1]))

    def _ascent_part(self, batch: Any, shards: Shards) -> tuple[Any, Shards]:
        """What the ascent sees of a batch.

        Returns:
            The batch and its cuts, or those of the halves.
        """
        if self._options.ascent != "half":
            return batch, shards
        return pick(batch, shards.half_index()), shards.halved()

    def _ascend(
        self, loss_fn: LossFunction, batch: Any, shards: Shards, tracked: Tracked, scale: Scale | None
    ) -> tuple[Plan, Tensor]:
        batch, shards = self._ascent_part(batch, shards)
        assert self._table is not None
        with self._around(shards, first=True):
            return capture(
                loss_fn, batch, shards, tracked, self._table, self._paths[shards.count > 1],
                scale=scale, finite=self._options.check_finite and scale is None,
                equal=self._options.shard_weight is None,
            )  # fmt: skip

    def _descend(
        self, loss_fn: LossFunction, batch: Any, shards: Shards, plan: Plan, scale: Scale | None, weight: float
    ) -> Tensor:
        assert self._table is not None
        equal = self._options.shard_weight is None and self._options.ascent == "half"  # pass 1 saw halves only
        tape = Tape(self._table, shards, "apply", RULES, self._paths[shards.count > 1], plan, equal=equal)
        with self._around(shards, first=False):
            with tape:
                loss = loss_fn(batch)
            loss = check_loss(loss, finite=False)
            tape.finish()
            plan.release()
            backward(loss, scale, factor=weight)
        return loss.detach()

    def _around(self, shards: Shards, first: bool) -> AbstractContextManager[object]:
        """What must hold around a pass. Compiled code in it would keep its uses of parameters out of sight.

        Returns:
            A context.
        """
        if not (self._norms or self._parallel or self._compiled):
            return nullcontext()
        with ExitStack() as stack:
            if self._compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if first:
                stack.enter_context(unsynchronised(self._model))
                stack.enter_context(undone(self._norms, ChangedError))
            stack.enter_context(statistics(self._norms, self._options.bn, first=first))
            stack.enter_context(counted(self._norms, shards.count))
            return stack.pop_all()

    def _prove(self, loss_fn: LossFunction, batch: Any, shards: Shards, tracked: Tracked, finite: bool) -> None:
        if shards.count > 1:
            for module in self._norms:
                if module.training and module.momentum is None:
                    raise UnsupportedError("batch norm with a cumulative average (momentum=None)")
        batch, shards = self._ascent_part(batch, shards)
        assert self._table is not None
        path = prove(self._model, loss_fn, batch, shards, tracked, self._table, self._options, finite)
        if path.compiled and not self._compiled:
            self._compiled = True
            warnings.warn(
                "msam: ghost mode runs compiled code uncompiled; mode='sequential' keeps it compiled", stacklevel=8
            )
        paths = self._paths[shards.count > 1]
        for place, earlier in enumerate(paths):
            if path.follows(earlier):
                paths[place] = path.after(earlier)
                return
        paths.append(path)
        self._batches = 1


def counted(norms: Sequence[_NormBase], micro_batches: int) -> AbstractContextManager[None]:
    """Let batch norms count every micro-batch, as they do when these come one by one.

    Args:
        norms: The model's batch norms.
        micro_batches: Their number m.

    Returns:
        A context.
    """
    return _counted(norms, micro_batches) if norms and micro_batches > 1 else nullcontext()


@contextmanager
def _counted(norms: Sequence[_NormBase], micro_batches: int) -> Iterator[None]:
    counters = [m.num_batches_tracked for m in norms if m.training and m.num_batches_tracked is not None]
    before = [c.clone() for c in counters]
    yield
    for counter, value in zip(counters, before, strict=True):
        counter += (counter - value) * (micro_batches - 1)
