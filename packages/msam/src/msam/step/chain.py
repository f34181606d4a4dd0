"""What a chained ascent hands from step to step: every slot's gradient of the last step that it took part in."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from msam.step.gradients import Gradients


@dataclass(frozen=True)
class Link:
    """Gradients of consecutive slots.

    Attributes:
        first: The first slot.
        gradients: Of the slots.
        weights: What each slot's loss was multiplied with before it was differentiated.
        versions: Version counters of the tensors that are held, which nobody may overwrite.
    """

    first: int
    gradients: Gradients
    weights: tuple[float, ...]
    versions: tuple[int, ...]


class Chain:
    """The gradients of the last step, by slot: the place of a micro-batch in its batch. Engines read and write it.

    Attributes:
        links: What is held; their slots do not overlap.
    """

    def __init__(self) -> None:
        self.links: list[Link] = []
        self._parameters: Sequence[Tensor] = ()

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Take note of the perturbed parameters; gradients of other ones are void."""
        if len(parameters) != len(self._parameters) or not all(map(operator.is_, parameters, self._parameters)):
            if self._parameters:
                self.links = []
            self._parameters = parameters

    def take(self, first: int, count: int) -> tuple[Gradients, list[float]]:
        """Gradients of consecutive slots; those of a slot that has had none are absent or 0.

        Args:
            first: The first slot.
            count: How many.

        Returns:
            The gradients, and what each slot's loss was multiplied with.

        Raises:
            ValueError: If somebody has overwritten a tensor of the last step meanwhile.
        """
        found, weights = Gradients(count), [1.0] * count
        for link in self.links:
            low, high = max(first, link.first), min(first + count, link.first + link.gradients.count)
            if low >= high:
                continue
            if any(t._version != v for t, v in zip(link.gradients.tensors(), link.versions, strict=True)):
                raise ValueError(
                    "ascent: 'chained' keeps the activations of a step for the next one, and some were overwritten "
                    "in between, as by a model that reuses its buffers; use ascent='full'"
                )
            piece = link.gradients.placed(low - link.first, high - link.first, low - first, count)
            if found.dense or found.factors or found.tokens:
                found.add(piece)
            else:
                found = piece
            weights[low - first : high - first] = link.weights[low - link.first : high - link.first]
        return found, weights

    def drop(self, first: int, count: int) -> None:
        """Forget the gradients of consecutive slots."""
        kept = []
        for link in self.links:
            last = link.first + link.gradients.count
            for low, high in ((link.first, min(first, last)), (max(first + count, link.first), last)):
                if low < high:
                    start, stop = low - link.first, high - link.first
                    part = link.gradients.placed(start, stop, 0, high - low)
                    kept.append(_link(low, part, link.weights[start:stop]))
        self.links = kept

    def put(self, first: int, gradients: Gradients, weights: Sequence[float]) -> None:
        """Keep the gradients of consecutive slots for the next step.

        Args:
            first: The first slot.
            gradients: Of the slots.
            weights: What each slot's loss was multiplied with.
        """
        self.drop(first, gradients.count)
        self.links.append(_link(first, gradients, weights))

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint holds."""
        return [{"first": k.first, "weights": list(k.weights), **k.gradients.state()} for k in self.links]

    def load(self, state: Sequence[dict[str, Any]], parameters: Sequence[Tensor]) -> None:
        """Take over what a checkpoint holds, for the same parameters."""
        self._parameters = parameters
        device = parameters[0].device
        self.links = [_link(s["first"], Gradients.from_state(s, device), s["weights"]) for s in state]


def _link(first: int, gradients: Gradients, weights: Sequence[float]) -> Link:
    return Link(first, gradients, tuple(weights), tuple(t._version for t in gradients.tensors()))
