"""The two passes of one micro-batch by hand, for loops that compute and accumulate their losses themselves."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from core_tensor.checks import check_number
from torch import Tensor, nn

from msam.engines.sequential import GradientDrawer, noticed, poison, taken
from msam.step.options import Options
from msam.step.passes import Generators, norm_layers, statistics, unsynchronised
from msam.step.perturbation import Tracked, moved, norm_of, perturbation, size_of
from msam.step.record import StepRecord
from msam.step.state import State

_UNSEEN = {
    "half": "needs a batch that it can halve",
    "chained": "has no pass 1, and needs to know which slot a micro-batch is",
}


class Other:
    """A parameter of another optimizer, whose gradient gets the mean of the descents added.

    Args:
        parameter: The parameter.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self._base: Tensor | None = None  # the gradient that was there before
        self._mean: Tensor | None = None  # of the descents so far
        self._late: Tensor | None = None  # of the last one

    def lay_aside(self) -> None:
        """Take the gradient away before a backward pass."""
        if self._mean is None:
            self._base = self._parameter.grad
        self._parameter.grad = None

    def take(self) -> None:
        """Take what the backward pass has left."""
        self._late, self._parameter.grad = self._parameter.grad, None

    def average(self, new: float) -> None:
        """Move the mean.

        Args:
            new: Share of the last descent in the mean of all of them.
        """
        if self._mean is not None:
            self._mean.mul_(1 - new)
        if self._late is not None:
            self._mean = self._late.mul_(new) if self._mean is None else self._mean.add_(self._late, alpha=new)
            self._late = None
        if self._base is None or self._mean is None:
            self._parameter.grad = self._base if self._mean is None else self._mean.clone()
        else:
            self._parameter.grad = self._base + self._mean


class Climb(NamedTuple):
    """What an ascent leaves for the descent.

    Attributes:
        tracked: What is perturbed, and how far.
        steps: The perturbations; None each if the gradient is not finite.
        norm: ||g_j|| (of T g_j under ASAM), scalar tensor.
        generators: States of the random generators before the ascent.
        state: What the ascent has left in the model, which the descent writes again.
    """

    tracked: Tracked
    steps: list[Tensor | None]
    norm: Tensor
    generators: Generators
    state: State


class ByHand:
    """What `MSAM.ascent` leaves for `MSAM.descent`, and the micro-batches whose mean is in `.grad`.

    The optimizer's parameters are averaged from scratch in each step. A loss may reach others, which another optimizer
    trains: their mean is added to the gradient that they have.

    Args:
        model: The model whose buffers and wrappers the passes respect.
        options: mSAM's options.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self._model = model
        self._options = options
        self._climb: Climb | None = None
        self.restart()

    def restart(self) -> None:
        """Begin a new mean: what `.grad` holds no longer counts."""
        self._weight, self._rho = 0.0, 0.0
        self._norms: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._finite = True
        self._others: dict[int, Other] = {}

    @contextmanager
    def ascent(self, tracked: Tracked, trainable: Sequence[Tensor]) -> Iterator[None]:
        """See `MSAM.ascent`.

        Args:
            tracked: What is perturbed, and how far.
            trainable: All parameters with gradients.

        Yields:
            Nothing.

        Raises:
            ValueError: If the ascent needs to see the batch, or the block left no gradient.
        """
        if self._options.ascent in _UNSEEN:
            raise ValueError(
                f"ascent: {self._options.ascent!r} {_UNSEEN[self._options.ascent]}, which ascent()/descent() and "
                "step(closure) do not see; use step(loss_fn, batch)"
            )
        generators, before = Generators({p.device for p in trainable}), State(self._model)
        drawer = GradientDrawer(trainable)
        others = GradientDrawer([])
        try:
            with (
                noticed(self._model, trainable, others.add),
                unsynchronised(self._model),
                statistics(norm_layers(self._model), self._options.bn, first=True),
            ):
                yield
            steps, norm = perturbation(tracked, taken([p.grad for p in tracked.parameters]))
        finally:
            drawer.close()
            others.close()
        steps = steps if math.isfinite(norm) else [None] * len(steps)
        self._climb = Climb(tracked, steps, norm, generators, State(self._model, before))

    @contextmanager
    def descent(self, trainable: Sequence[Tensor], weight: float, perturbs: bool) -> Iterator[None]:
        """See `MSAM.descent`.

        Args:
            trainable: All parameters with gradients.
            weight: Weight of this micro-batch in the mean.
            perturbs: Whether this step does; otherwise the block is its only pass.

        Yields:
            Nothing.

        Raises:
            ValueError: If `ascent` did not come before, or the block left no gradient.
        """
        climb, self._climb = self._climb, None
        if climb is None and perturbs:
            raise ValueError("descent: expected an ascent() block before it, got none")
        check_number("weight", weight, low=0.0, open_low=True)
        if all(p.grad is None for p in trainable):  # cleared behind our back, as by `model.zero_grad()`
            self.restart()
        drawer = GradientDrawer(trainable)
        if climb is not None and self._options.rng == "same":
            climb.generators.rewind()
        mine: list[Other] = []
        try:
            with (
                nullcontext() if climb is None else moved(climb.tracked.parameters, climb.steps),
                noticed(self._model, trainable, lambda found: mine.extend(map(self._lay_aside, found))),
                statistics(norm_layers(self._model), self._options.bn, first=climb is None),
            ):
                yield
            late = taken([p.grad for p in trainable])
        finally:
            drawer.close()
            if climb is not None:
                climb.state.restore()
            for other in mine:
                other.take()
        new = weight / (self._weight + weight)
        with torch.no_grad():
            for p, g in zip(trainable, late, strict=True):
                old = p.grad if self._weight else None
                if g is not None:
                    p.grad = g.mul_(new) if old is None else old.mul_(1 - new).add_(g, alpha=new)
                elif old is not None:
                    old.mul_(1 - new)
            for other in self._others.values():
                other.average(new)
        self._weight += weight
        if climb is not None:
            self._note(climb)

    def _lay_aside(self, parameter: Tensor) -> "Other":
        other = self._others.setdefault(id(parameter), Other(parameter))
        other.lay_aside()
        return other

    def _note(self, climb: Climb) -> None:
        self._rho = climb.tracked.radii[0]
        self._norms.append(climb.norm.detach())
        if not climb.tracked.uniform:
            self._sizes.append(size_of(climb.steps))
        if not math.isfinite(climb.norm):  # whoever scaled the loss skips the update; nobody else may miss it
            self._finite = False
            poison(climb.tracked.parameters)

    @property
    def record(self) -> StepRecord:
        """The micro-batches so far, without the losses, which only the caller has seen."""
        unknown = torch.full((), torch.nan)
        norms = torch.stack(self._norms) if self._norms else torch.empty(0)
        sizes = torch.stack(self._sizes) if self._sizes else None
        mode = "by hand" if self._norms else "plain"
        return StepRecord(mode, self._rho, unknown, unknown, norms, not self._finite, sizes)

    def check(self, trainable: Callable[[], Sequence[Tensor]]) -> None:
        """Refuse to update with a gradient that is not finite, where `check_finite` asks for it.

        The ascent cannot tell whether the caller scaled the loss. It makes `.grad` infinite instead, so that a
        GradScaler skips the update; an update that comes nevertheless is one without a scaler.

        Args:
            trainable: Gives all parameters with gradients.

        Raises:
            ValueError: If the ascent gradient of a micro-batch, or the mean of the descents', is not finite.
        """
        if not (self._weight and self._options.check_finite):
            return
        norm = float(norm_of([p.grad for p in trainable() if p.grad is not None]))
        if not (self._finite and math.isfinite(norm)):
            raise ValueError(
                f"loss: expected finite gradients, got norms {[float(n) for n in self._norms]} of the ascents and "
                f"{norm} of the gradient by hand"
            )
