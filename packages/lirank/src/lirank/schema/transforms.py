"""Statistics of numeric columns, gathered in one pass in any order of the blocks that is repeatable."""

from dataclasses import dataclass, field

import numpy as np

KNOTS = 64
"""Quantiles kept for the map to a normal distribution."""
_SAMPLE = 1 << 16


@dataclass
class DenseStatistics:
    """What a transform needs to know of one column, after log1p where the transform is `log1p`.

    Attributes:
        count: Values seen.
        mean: Their mean.
        squares: Sum of squared deviations.
        low: Least value.
        high: Greatest value.
        sample: Values kept for quantiles, at most 65,536, chosen evenly by position.
        stride: Every how many values one is kept.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = np.inf
    high: float = -np.inf
    sample: np.ndarray = field(default_factory=lambda: np.zeros(0))
    stride: int = 1

    def observe(self, values: np.ndarray) -> None:
        """Add the values of a block, NaN excluded."""
        values = values[~np.isnan(values)]
        if len(values) == 0:
            return
        total, mean = self.count + len(values), float(values.mean())
        step = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + step**2 * self.count * len(values) / total
        self.mean += step * len(values) / total
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        first = -self.count % self.stride
        self.sample = np.concatenate([self.sample, values[first :: self.stride]])
        self.count = total
        while len(self.sample) > _SAMPLE:
            self.sample, self.stride = self.sample[::2], self.stride * 2

    @property
    def deviation(self) -> float:
        """Standard deviation; 1 for a constant."""
        deviation = float(np.sqrt(self.squares / self.count)) if self.count else 0.0
        return deviation if deviation > 0 else 1.0

    def knots(self) -> np.ndarray:
        """Quantiles at (i + 1/2) / KNOTS, shape (KNOTS,)."""
        if len(self.sample) == 0:
            return np.zeros(KNOTS)
        found: np.ndarray = np.quantile(self.sample, (np.arange(KNOTS) + 0.5) / KNOTS)
        return found
