"""Which engine computes a gradient: ghost where it can, and what stands in for it."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from msam.engines.ghost import Ghost, UnsupportedError
from msam.engines.sequential import LossFunction, Scale, Sequential
from msam.engines.vectorised import vectorised_gradient
from msam.step.batches import Shards
from msam.step.options import Options
from msam.step.passes import is_sharded
from msam.step.perturbation import Tracked
from msam.step.record import StepRecord

Trainable = Callable[[], Sequence[Tensor]]


class Engines:
    """The engines of one optimizer.

    Args:
        model: The model whose buffers and wrappers the passes respect.
        options: mSAM's options.
        trainable: All parameters with gradients.

    Raises:
        ValueError: If a sharded (FSDP2) model is to be perturbed in weight space.
    """

    def __init__(self, model: nn.Module, options: Options, trainable: Sequence[Tensor]) -> None:
        possible = options.ascent != "chained" and options.scaling != "element"
        if is_sharded(model) and (options.mode in {"sequential", "vmap"} or not possible):
            raise ValueError(
                "mode: a model sharded by FSDP2 has no whole weights to perturb; expected mode='ghost' with an "
                f"ascent and scaling it supports, got mode={options.mode!r}, ascent={options.ascent!r}, "
                f"adaptive={options.adaptive!r}"
            )
        self._model = model
        self._options = options
        self._sequential = Sequential(model, options, trainable)
        wanted = options.mode in {"auto", "ghost"} and possible
        self._ghost: Ghost | None = Ghost(model, options, trainable) if wanted else None

    def sequential(self, trainable: Trainable) -> Sequential:
        """The sequential engine, which also takes plain steps.

        Args:
            trainable: Gives all parameters that have gradients now.

        Returns:
            The engine, told of them.
        """
        self._sequential.retrain(trainable())
        return self._sequential

    def perturbed(
        self, loss_fn: LossFunction, batch: Any, shards: Shards, tracked: Tracked, trainable: Trainable,
        *, scale: Scale | None = None, weight: float = 1.0,
    ) -> StepRecord:  # fmt: skip
        """Add the weighted mSAM gradient of a batch to `.grad`; a ghost engine that cannot follow the model is dropped.

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
        if self._ghost is not None:
            try:
                record = self._ghost.accumulate(loss_fn, batch, shards, tracked, scale=scale, weight=weight)
            except UnsupportedError as error:
                if is_sharded(self._model):
                    raise ValueError(
                        f"model: ghost mode cannot follow it, and FSDP2 has no other mode: {error}"
                    ) from error
                self._ghost = None
                warnings.warn(f"msam: sequential mode instead of ghost: {error}", stacklevel=5)
            else:
                if tracked.uniform:
                    return record
                return replace(record, perturbation_norms=torch.full_like(record.gradient_norms, torch.nan))
        if self._options.mode == "vmap":
            return vectorised_gradient(self._model, loss_fn, batch, tracked, self._options, scale=scale, weight=weight)
        return self.sequential(trainable).accumulate(loss_fn, batch, shards, tracked, scale=scale, weight=weight)

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
        loss = self.sequential(trainable).plain(loss_fn, batch, shards, scale=scale, weight=weight)
        return StepRecord("plain", 0.0, loss, loss, torch.empty(0))

    @property
    def previous(self) -> list[list[Tensor]]:
        """Every slot's gradient of the last step, for a chained ascent."""
        return self._sequential.previous

    @previous.setter
    def previous(self, slots: Sequence[Sequence[Tensor]]) -> None:
        self._sequential.previous = [list(slot) for slot in slots]

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Put back what a step leaves for the next one.

        Yields:
            Nothing.
        """
        kept = list(self.previous)
        try:
            yield
        finally:
            self.previous = kept
