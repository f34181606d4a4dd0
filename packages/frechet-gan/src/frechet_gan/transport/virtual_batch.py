"""Exact gradients of one large batch from micro-batches, in two passes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from frechet_gan.frechet.regression import regress


class SplitLoss(Protocol):
    """What the two passes need of a loss; `TransportLoss` documents the methods."""

    def encoded(self, fake: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features of both sides, checked."""

    def encode(self, name: str, side: Tensor) -> Tensor:
        """Features of one side."""

    def whitening(self, features: Tensor, reals: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """What both sides are whitened by."""

    def whitened(self, rows: Tensor, white: tuple[Tensor, Tensor] | None) -> Tensor:
        """Features in the space in which they are compared."""

    def solve(self, features: Tensor, reals: Tensor | None) -> tuple[Tensor, Tensor]:
        """Distance and gradient."""

    def normalised(self, loss: Tensor, value: Tensor | None = None) -> Tensor:
        """The loss as it is differentiated."""


class VirtualBatch:
    """The two passes of `TransportLoss.virtual_batch`.

    Between the passes it holds the features of the whole batch, not their graph.

    Args:
        loss: The loss.
    """

    def __init__(self, loss: SplitLoss) -> None:
        self._loss = loss
        self._seen: list[tuple[Tensor, Tensor | None]] = []
        self._white: tuple[Tensor, Tensor] | None = None
        self._solution: tuple[Tensor, Tensor] | None = None
        self._rows = torch.empty(0)
        self._next = 0

    @torch.no_grad()
    def observe(self, fake: Tensor, real: Tensor | None = None) -> None:
        """First pass: remember a micro-batch's features.

        Args:
            fake: Generated features or images.
            real: Real features or images that belong to the batch; needed without a reference.

        Raises:
            RuntimeError: If the second pass has begun.
        """
        if self._solution is not None:
            raise RuntimeError("virtual_batch: observe every micro-batch before the first loss")
        features, reals = self._loss.encoded(fake, real)
        self._seen.append((features.detach(), reals))

    def loss(self, fake: Tensor) -> Tensor:
        """Second pass: the part of the loss that belongs to the next micro-batch.

        Args:
            fake: The same images or features as in the first pass, now with a graph.

        Returns:
            A scalar; over the micro-batches, values and gradients add up to the whole batch's.

        Raises:
            ValueError: If the features are not those of the first pass, or there are more of them.
        """
        if self._solution is None:
            self._solution = self._solve()
        value, gradient = self._solution
        features = self._loss.encode("fake", fake)
        start, stop, total = self._next, self._next + features.shape[0], self._rows.shape[0]
        if stop > total:
            raise ValueError(f"fake: expected at most {total - start} more features, got {features.shape[0]}")
        gap = float((features.detach() - self._rows[start:stop]).abs().max())
        if not gap <= 1e-4 * float(self._rows.abs().max()):
            raise ValueError(
                f"fake: expected the features of the first pass, got a difference of {gap:.3g}; batch normalisation "
                "in training mode or another random state between the passes makes virtual batches inexact"
            )
        self._next = stop
        share = value * (features.shape[0] / total)
        part = regress(self._loss.whitened(features, self._white), share, gradient[start:stop])
        return self._loss.normalised(part, value)

    def finish(self) -> None:
        """Check that the second pass saw every feature of the first.

        Raises:
            RuntimeError: If it did not.
        """
        total = sum(f.shape[0] for f, _ in self._seen)
        if self._next != total:
            raise RuntimeError(f"virtual_batch: the second pass saw {self._next} of {total} features")

    @torch.no_grad()
    def _solve(self) -> tuple[Tensor, Tensor]:
        if not self._seen:
            raise ValueError("virtual_batch: observe at least one micro-batch before the first loss")
        loss = self._loss
        self._rows = torch.cat([f for f, _ in self._seen])
        pieces = [r for _, r in self._seen if r is not None]
        reals = torch.cat(pieces) if pieces else None
        self._white = loss.whitening(self._rows, reals)
        reals = None if reals is None else loss.whitened(reals, self._white)
        return loss.solve(loss.whitened(self._rows, self._white), reals)
