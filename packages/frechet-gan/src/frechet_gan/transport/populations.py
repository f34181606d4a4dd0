r"""Whose moments the Gaussian plan compares: the batch's, those of a queue of past batches, or moving averages.

The moments that are mixed are the raw ones, E[x] and E[xxᵀ] (mixing covariances would lose the spread between the
means). With weight 1 - β of the batch, the gradient in a feature is $(1-\beta)\frac2n (f_i - m(f_i))$.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from core_tensor.checks import check_number
from torch import Tensor, nn

from frechet_gan.frechet.gaussian import GaussianMap
from frechet_gan.frechet.stats import FeatureStats


@dataclass(frozen=True)
class BatchPopulation:
    """The current batch alone."""


@dataclass(frozen=True)
class QueuePopulation:
    """The current batch and the last features before it.

    Attributes:
        size: Number of past features that are kept.
    """

    size: int = 50_000

    def __post_init__(self) -> None:
        check_number("size", self.size, low=2, integer=True)


@dataclass(frozen=True)
class EMAPopulation:
    """Exponential moving averages of the raw moments.

    Attributes:
        beta: Weight of the past.
        warmup: Features that are averaged evenly before `beta` takes over: until then the past weighs
            seen / (seen + batch), if that is less.
    """

    beta: float = 0.999
    warmup: int = 50_000

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0, high=1, open_high=True)
        check_number("warmup", self.warmup, low=0, integer=True)


Population = BatchPopulation | QueuePopulation | EMAPopulation


class State(nn.Module):
    """Buffers whose shapes are not known before the first batch; they follow the module's device but stay float64."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, own in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and own is not None:
                self._buffers[name] = torch.empty_like(saved, device=own.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # type: ignore[no-untyped-call]
        return self


class MovingMoments(State):
    """State of an `EMAPopulation`: number of rows seen, mean and covariance (divisor n) of the mixture.

    Args:
        options: The population.
    """

    seen: Tensor
    mean: Tensor
    covariance: Tensor

    def __init__(self, options: EMAPopulation) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("covariance", torch.zeros(0, 0, dtype=torch.float64))

    def mix(self, rows: Tensor) -> float:
        """Add a batch.

        Mixing raw moments with weights β and 1 - β is, about the means and without cancellation,
        Σ = βΣ_old + (1-β)Σ_batch + β(1-β)(μ_old - μ_batch)(μ_old - μ_batch)ᵀ.

        Args:
            rows: The batch, shape (n, d).

        Returns:
            β, the weight the past had.
        """
        batch = FeatureStats.from_features(rows)
        mean, covariance = batch.mean, batch.scatter / batch.count
        seen = int(self.seen)
        beta = self.options.beta if seen else 0.0
        if seen < self.options.warmup:
            beta = min(beta, seen / (seen + batch.count))
        if seen:
            shift = self.mean.to(mean) - mean
            covariance = beta * self.covariance.to(mean) + (1 - beta) * covariance
            covariance += beta * (1 - beta) * torch.outer(shift, shift)
            mean = mean + beta * shift
        self.mean, self.covariance = mean, covariance
        self.seen += batch.count
        return beta


class Queue(State):
    """State of a `QueuePopulation`: the last features, oldest first.

    Args:
        options: The population.
    """

    rows: Tensor

    def __init__(self, options: QueuePopulation) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("rows", torch.zeros(0, 0, dtype=torch.float64))

    def push(self, batch: Tensor) -> Tensor:
        """Append a batch and drop the oldest features beyond the size.

        Args:
            batch: Features, shape (n, d), float64.

        Returns:
            The batch followed by what was queued before it, shape (n + queued, d).
        """
        held = self.rows.to(batch) if self.rows.numel() else batch[:0]
        self.rows = torch.cat([held, batch])[-self.options.size :].clone()
        return torch.cat([batch, held])


class LazyMap(State):
    """The Gaussian map of a moving average, computed anew every so many steps.

    Args:
        every: Number of steps.
    """

    steps: Tensor
    source: Tensor
    target: Tensor
    matrix: Tensor
    distance: Tensor

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for name in ("source", "target", "matrix", "distance"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))

    def get(self, compute: Callable[[], GaussianMap]) -> GaussianMap:
        """The map of this step.

        Args:
            compute: Computes it; called at steps 0, k, 2k, ...

        Returns:
            The map, of this step or an earlier one.
        """
        if int(self.steps) % self.every == 0:
            fresh = compute()
            self.source, self.target = fresh.source, fresh.target
            self.matrix, self.distance = fresh.matrix, fresh.distance
        self.steps += 1
        return GaussianMap(self.source, self.target, self.matrix, self.distance)
