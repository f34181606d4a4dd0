r"""Whose moments the Gaussian plan compares: the batch's, those of a queue of past batches, or moving averages.

The moments that are mixed are the raw ones, E[x] and E[xxᵀ] (mixing covariances would lose the spread between the
means). With weight 1 - β of the batch, the gradient in a feature is $(1-\beta)\frac2n (f_i - m(f_i))$.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from core_tensor.checks import check_number
from torch import Tensor

from frechet_gan.stats import FeatureStats


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


class MovingMoments:
    """State of an `EMAPopulation`: mean and covariance (divisor n) of the mixture.

    Args:
        options: The population.
    """

    def __init__(self, options: EMAPopulation) -> None:
        self.options = options
        self.seen = 0
        self.mean: Tensor | None = None
        self.covariance: Tensor | None = None

    def mix(self, batch: FeatureStats) -> float:
        """Add a batch.

        Mixing raw moments with weights β and 1 - β is, about the means and without cancellation,
        Σ = βΣ_old + (1-β)Σ_batch + β(1-β)(μ_old - μ_batch)(μ_old - μ_batch)ᵀ.

        Args:
            batch: The batch's statistics.

        Returns:
            β, the weight the past had.
        """
        mean, covariance = batch.mean, batch.scatter / batch.count
        if self.mean is None or self.covariance is None:
            beta = 0.0
            self.mean, self.covariance = mean, covariance
        else:
            beta = self.options.beta
            if self.seen < self.options.warmup:
                beta = min(beta, self.seen / (self.seen + batch.count))
            shift = self.mean.to(mean) - mean
            self.covariance = beta * self.covariance.to(mean) + (1 - beta) * covariance
            self.covariance = self.covariance + beta * (1 - beta) * torch.outer(shift, shift)
            self.mean = mean + beta * shift
        self.seen += batch.count
        return beta

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the mixture.

        Returns:
            Mean (d,) and covariance with divisor n (d, d).

        Raises:
            RuntimeError: Before the first batch.
        """
        if self.mean is None or self.covariance is None:
            raise RuntimeError("EMAPopulation: no batch was seen yet")
        return self.mean, self.covariance

    def state(self) -> dict[str, Any]:
        """Everything needed to go on.

        Returns:
            Tensors and numbers.
        """
        return {"seen": self.seen, "mean": self.mean, "covariance": self.covariance}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: What `state` returned.
        """
        self.seen, self.mean, self.covariance = state["seen"], state["mean"], state["covariance"]


class Queue:
    """State of a `QueuePopulation`: the last features, oldest first.

    Args:
        options: The population.
    """

    def __init__(self, options: QueuePopulation) -> None:
        self.options = options
        self.rows: Tensor | None = None

    def joined(self, batch: Tensor) -> Tensor:
        """The batch followed by the queue.

        Args:
            batch: Features, shape (n, d), float64.

        Returns:
            Features, shape (n + queued, d).
        """
        return batch if self.rows is None else torch.cat([batch, self.rows.to(batch)])

    def push(self, batch: Tensor) -> None:
        """Append a batch and drop the oldest features beyond the size.

        Args:
            batch: Features, shape (n, d).
        """
        rows = batch.detach() if self.rows is None else torch.cat([self.rows.to(batch), batch.detach()])
        self.rows = rows[-self.options.size :].clone()

    def state(self) -> dict[str, Any]:
        """Everything needed to go on.

        Returns:
            The queued features.
        """
        return {"rows": self.rows}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: What `state` returned.
        """
        self.rows = state["rows"]
