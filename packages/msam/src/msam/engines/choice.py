"""Which engine computes a gradient: ghost where it can and is not slower, and its fallback."""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from msam.engines.ghost import DisagreeError, Ghost, UnsupportedError
from msam.engines.sequential import (
    GradientDrawer,
    LossFunction,
    Piece,
    Scale,
    Sequential,
    Stretch,
    noticed,
    stretches,
)
from msam.engines.vectorised import vectorised_gradient
from msam.step.batches import Shards
from msam.step.chain import Chain
from msam.step.options import Options
from msam.step.passes import Generators, is_sharded, norm_layers, remembered, unsynchronised
from msam.step.perturbation import Tracked
from msam.step.record import StepRecord
from msam.step.state import State

Trainable = Callable[[], Sequence[Tensor]]

TRIALS = 3
"""Timed steps of each engine by which `auto` decides, after one of each that is not counted."""

ENOUGH = 2.0
"""Seconds of timed steps after which no further ones are taken."""

GAIN = 1.05
"""Sequential mode has to be faster than ghost by this factor, so that noise does not decide what is about equal."""

PATIENCE = 3
"""Batches in a row on whose decisions the micro-batches disagree before ghost mode is given up."""


class Engines:
    """The engines of one optimizer.

    Args:
        model: The model whose buffers and wrappers the passes respect.
        options: mSAM's options.
        trainable: All parameters with gradients.

    Attributes:
        chain: What a chained ascent hands from step to step.
        winners: The faster engine for batches cut into micro-batches of some sizes; None where nothing is timed.

    Raises:
        ValueError: If a sharded (FSDP2) model is to be perturbed in weight space.
    """

    def __init__(self, model: nn.Module, options: Options, trainable: Sequence[Tensor]) -> None:
        possible = options.scaling != "element"
        if is_sharded(model) and (options.mode in {"sequential", "vmap"} or not possible):
            raise ValueError(
                "mode: a model sharded by FSDP2 has no whole weights to perturb; expected mode='ghost' with an "
                f"ascent and scaling it supports, got mode={options.mode!r}, ascent={options.ascent!r}, "
                f"adaptive={options.adaptive!r}"
            )
        self._model = model
        self._options = options
        self.chain = Chain()
        self._sequential = Sequential(model, options, trainable, self.chain)
        wanted = options.mode in {"auto", "ghost"} and possible
        self._ghost: Ghost | None = Ghost(model, options, trainable, self.chain) if wanted else None
        self._alone = not (isinstance(model, DistributedDataParallel) or is_sharded(model))
        # Processes of a group have to take the same engine, which timing would not promise.
        timed = options.mode == "auto" and wanted and self._alone
        self.winners: dict[tuple[int, ...], str] | None = {} if timed else None
        self._devices = {p.device for p in trainable}
        self._refusals = 0
        self._warned = False

    def sequential(self, trainable: Trainable) -> Sequential:
        """The sequential engine, which also takes plain steps.

        Args:
            trainable: Gives all parameters that have gradients now.

        Returns:
            The engine, told of them.
        """
        self._sequential.trainable = trainable()
        return self._sequential

    def perturbed(
        self, loss_fn: LossFunction, batch: Any, shards: Shards, tracked: Tracked, trainable: Trainable,
        *, scale: Scale | None = None, weight: float = 1.0,
    ) -> StepRecord:  # fmt: skip
        """Add the weighted mSAM gradient of a batch to `.grad`.

        Args:
            loss_fn: Mean loss of a (micro-)batch.
            batch: Tree of tensors, examples first.
            shards: How it is cut.
            tracked: What is perturbed, and how far.
            trainable: Gives all parameters that have gradients now.
            scale: GradScaler's scaling of a loss, or None.
            weight: Factor of this batch's gradient.

        Returns:
            The step's record.

        Raises:
            ValueError: If ghost mode cannot follow a sharded model.
        """
        if self._options.mode == "vmap":
            return vectorised_gradient(self._model, loss_fn, batch, tracked, self._options, scale=scale, weight=weight)
        cut_up = stretches(batch, shards, self._options)
        engine = "sequential" if self._ghost is None else "ghost"
        if self.winners is not None and self._ghost is not None:
            if shards.sizes not in self.winners:
                self.winners[shards.sizes] = self._race(loss_fn, cut_up, tracked, trainable, scale)
            engine = self.winners[shards.sizes]
        found = [p for s in cut_up for p in self._pieces(engine, loss_fn, s, tracked, trainable, scale, weight)]
        return _record(found, tracked)

    def _race(
        self, loss_fn: LossFunction, cut_up: Sequence[Stretch], tracked: Tracked, trainable: Trainable,
        scale: Scale | None,
    ) -> str:  # fmt: skip
        """Time both engines on a batch of a new shape, in rehearsals that leave no trace.

        Not where the loss draws random numbers: the engines draw other ones, and what a run computes may not depend on
        the clock.

        Returns:
            The faster engine.
        """
        seconds: dict[str, list[float]] = {"ghost": [], "sequential": []}
        for trial in range(1 + TRIALS):
            for engine, taken in seconds.items():
                with self.rehearsal(trainable()) as spent:
                    if self._options.ascent == "chained":  # which follows a step before
                        for stretch in cut_up:
                            self._pieces(engine, loss_fn, stretch, tracked, trainable, scale, 1.0)
                        spent.clear()
                    before, start = torch.get_rng_state(), _now(self._devices)
                    for stretch in cut_up:
                        self._pieces(engine, loss_fn, stretch, tracked, trainable, scale, 1.0)
                    taken.append(_now(self._devices) - start - sum(spent))
                    draws = not torch.equal(before, torch.get_rng_state())
                if draws or self._ghost is None:
                    return "ghost"
            if trial and sum(map(sum, seconds.values())) > ENOUGH:
                break
        ghost, sequential = (statistics.median(taken[1:]) for taken in seconds.values())
        return "sequential" if sequential * GAIN < ghost else "ghost"

    def _pieces(
        self, engine: str, loss_fn: LossFunction, stretch: Stretch, tracked: Tracked, trainable: Trainable,
        scale: Scale | None, weight: float,
    ) -> list[Piece]:  # fmt: skip
        """One stretch by an engine; what ghost mode cannot follow is done one micro-batch at a time."""
        refusal = None
        if engine == "ghost" and self._ghost is not None:
            try:
                piece = self._ghost.accumulate(loss_fn, stretch, tracked, scale=scale, weight=weight)
            except UnsupportedError as error:
                refusal = error
            else:
                self._refusals = 0
                return [piece]
            runs = self._runs(refusal, stretch)
            if runs:
                parts = stretch.split(runs)
                return [p for s in parts for p in self._pieces(engine, loss_fn, s, tracked, trainable, scale, weight)]
        if refusal is not None and is_sharded(self._model):
            raise ValueError(f"model: ghost mode cannot follow it, and FSDP2 has no other mode: {refusal}") from refusal
        piece = self.sequential(trainable).accumulate(loss_fn, stretch, tracked, scale=scale, weight=weight)
        if refusal is not None:
            self._note(refusal)
        return [piece]

    def _runs(self, refusal: UnsupportedError, stretch: Stretch) -> list[int]:
        """Lengths of the runs of micro-batches that agree on a decision, for ghost mode to take one after the other."""
        # In a group of processes all have to call the model equally often.
        if not isinstance(refusal, DisagreeError) or not self._alone or not isinstance(refusal.answers[0], bool):
            return []
        runs = [len(list(run)) for _, run in itertools.groupby(refusal.answers)]
        return runs if len(runs) < stretch.count else []

    def _note(self, refusal: UnsupportedError) -> None:
        self._refusals += 1
        if not isinstance(refusal, DisagreeError) or self._refusals > PATIENCE:
            self._ghost = None
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"msam: sequential mode instead of ghost: {refusal}. The gradients are the same; a step now costs two "
                f"passes over each of its micro-batches, one by one",
                stacklevel=6,
            )

    def plain(
        self, loss_fn: LossFunction, batch: Any, shards: Shards, trainable: Trainable, *, scale: Any, weight: float
    ) -> StepRecord:
        """Add the weighted plain gradient of a batch to `.grad`.

        Args:
            loss_fn: Mean loss of a (micro-)batch.
            batch: Tree of tensors, examples first.
            shards: How it is cut.
            trainable: Gives all parameters that have gradients now.
            scale: GradScaler's scaling of a loss, or None.
            weight: Factor of this batch's gradient.

        Returns:
            The step's record.
        """
        engine, loss = self.sequential(trainable), torch.zeros(())
        for stretch in stretches(batch, shards, self._options):
            loss = loss + stretch.mean(engine.plain(loss_fn, stretch, scale=scale, weight=weight))
        return StepRecord("plain", 0.0, loss, loss, torch.empty(0))

    @contextmanager
    def rehearsal(self, trainable: Sequence[Tensor]) -> Iterator[list[float]]:
        """Leave gradients (anybody's), the model's state, generators and what a step leaves for the next as they were.

        Args:
            trainable: All parameters with gradients.

        Yields:
            Seconds that it takes itself, as they are spent.
        """
        links, generators = list(self.chain.links), Generators(self._devices)
        state, restore = State(self._model, copies=True), remembered(norm_layers(self._model))
        drawer = GradientDrawer(trainable)
        try:
            with noticed(self._model, trainable, drawer.add) as spent, unsynchronised(self._model):
                yield spent
        finally:
            drawer.close()
            self.chain.links = links
            state.restore()
            restore()
            generators.rewind()


def _now(devices: set[torch.device]) -> float:
    """Seconds of this process, or of the wall where an accelerator works."""
    others = [d for d in devices if d.type not in {"cpu", "meta"}]
    for device in others:
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter() if others else time.process_time()


def _record(pieces: Sequence[Piece], tracked: Tracked) -> StepRecord:
    """What the pieces of a step say together."""
    norms = pieces[0].norms if len(pieces) == 1 else torch.cat([piece.norms for piece in pieces])
    sizes = None
    if not tracked.uniform:
        unknown = [torch.full_like(p.norms, torch.nan) if p.sizes is None else p.sizes for p in pieces]
        sizes = torch.cat(unknown)
    mode = "ghost" if all(piece.mode == "ghost" for piece in pieces) else "sequential"
    early, late = pieces[0].loss, pieces[0].perturbed_loss
    for piece in pieces[1:]:
        early, late = early + piece.loss.to(early.device), late + piece.perturbed_loss.to(late.device)
    return StepRecord(mode, tracked.radii[0], early, late, norms, any(p.skipped for p in pieces), sizes)
