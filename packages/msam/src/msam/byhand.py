"""The two passes of one micro-batch by hand, for loops that compute and accumulate their losses themselves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from core_tensor.checks import check_number
from torch import Tensor, nn

from msam.options import Options
from msam.passes import Generators, norm_layers, statistics, unsynchronised
from msam.perturbation import Moved, Tracked, perturbation
from msam.sequential import GradientDrawer, take_gradients


class ByHand:
    """What `MSAM.ascent` leaves for `MSAM.descent`, and the weight of the micro-batches that are in `.grad`.

    Args:
        model: The model whose buffers and wrappers the passes respect.
        options: mSAM's options.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self._model = model
        self._options = options
        self._climbed: tuple[Moved, list[Tensor | None], Generators] | None = None
        self._weight = 0.0

    def restart(self) -> None:
        """Begin a new mean: what `.grad` holds no longer counts."""
        self._weight = 0.0

    @contextmanager
    def ascent(self, tracked: Tracked, trainable: Sequence[Tensor]) -> Iterator[None]:
        """See `MSAM.ascent`.

        Args:
            tracked: What is perturbed, and how far.
            trainable: All parameters with gradients.

        Yields:
            Nothing.
        """
        generators = Generators({p.device for p in trainable})
        drawer = GradientDrawer(trainable)
        try:
            with unsynchronised(self._model), statistics(norm_layers(self._model), self._options.bn, first=True):
                yield
            steps, _ = perturbation(tracked, take_gradients(tracked.parameters))
        finally:
            drawer.close()
        self._climbed = (Moved(tracked.parameters), steps, generators)

    @contextmanager
    def descent(self, trainable: Sequence[Tensor], weight: float) -> Iterator[None]:
        """See `MSAM.descent`.

        Args:
            trainable: All parameters with gradients.
            weight: Weight of this micro-batch in the mean.

        Yields:
            Nothing.

        Raises:
            ValueError: If `ascent` did not come before, or the block left no gradient.
        """
        if self._climbed is None:
            raise ValueError("descent: expected an ascent() block before it, got none")
        check_number("weight", weight, low=0.0, open_low=True)
        moved, steps, generators = self._climbed
        drawer = GradientDrawer(trainable)
        if self._options.rng == "same":
            generators.rewind()
        try:
            moved.move(steps)
            with statistics(norm_layers(self._model), self._options.bn, first=False):
                yield
            late = take_gradients(trainable)
        finally:
            moved.restore()
            drawer.close()
            self._climbed = None
        new = weight / (self._weight + weight)
        with torch.no_grad():
            for p, g in zip(trainable, late, strict=True):
                old = p.grad if self._weight else None
                if g is not None:
                    p.grad = g.mul_(new) if old is None else old.mul_(1 - new).add_(g, alpha=new)
                elif old is not None:
                    old.mul_(1 - new)
        self._weight += weight
