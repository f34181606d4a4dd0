"""The stability map over batch size and learning rate, the paper's picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sgd_stability.report.plots import plot_map
from sgd_stability.theory.dynamics import Update, noise_gain
from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.nested import compress
from sgd_stability.theory.sampling import Sampling, Scheme
from sgd_stability.theory.second_moment import Extreme, critical_mode, radius_from


@dataclass(frozen=True)
class StabilityMap:
    """Growth over a grid.

    Attributes:
        lrs: Learning rates, shape (rows,).
        batch_sizes: Batch sizes, shape (columns,).
        log_growth: Natural log of the growth of E||delta||^2 per step for plain SGD; with momentum or weight decay the
            log of the noise gain, which has the same sign. Infinite where the mean dynamics diverges.
        curves: Learning rates of the boundaries by name, each of shape (columns,).
        scheme: Minibatch scheme.
    """

    lrs: Tensor
    batch_sizes: Tensor
    log_growth: Tensor
    curves: Mapping[str, Sequence[float]]
    scheme: str

    @property
    def stable(self) -> Tensor:
        """Which cells are stable, shape (rows, columns)."""
        return self.log_growth < 0

    def plot(self, path: str | Path, title: str = "") -> Path:
        """Draw the heat map with its boundary curves.

        Args:
            path: Picture to write.
            title: Title.

        Returns:
            The path.
        """
        return plot_map(self, path, title)


def stability_map(
    family: CurvatureFamily,
    n: int,
    lrs: Sequence[float],
    batch_sizes: Sequence[int],
    scheme: Scheme,
    update: Update,
    curves: Mapping[str, Sequence[float]],
    *,
    directions: int = 128,
) -> StabilityMap:
    """Evaluate the growth on a grid, for the family compressed to a few directions.

    Args:
        family: The per-sample Hessians.
        n: Size of the data set.
        lrs: Learning rates.
        batch_sizes: Batch sizes.
        scheme: Minibatch scheme.
        update: Update rule.
        curves: Boundary curves to carry along.
        directions: Most directions for the colours; the curves do not depend on it.

    Returns:
        The map.
    """
    top = compress(family, directions)
    growth = torch.empty(len(lrs), len(batch_sizes), dtype=torch.float64)
    for j, batch_size in enumerate(batch_sizes):
        sampling = Sampling(n, batch_size, scheme)
        critical = critical_mode(top, sampling) if update.plain else None
        for i, lr in enumerate(lrs):
            growth[i, j] = _log_growth(top, lr, sampling, update, critical)
    return StabilityMap(torch.tensor(lrs, dtype=torch.float64), torch.tensor(batch_sizes), growth, dict(curves), scheme)


def _log_growth(
    family: CurvatureFamily,
    lr: float,
    sampling: Sampling,
    update: Update,
    critical: tuple[Extreme, Tensor | None] | None,
) -> float:
    if critical is not None:
        growth = radius_from(family, lr, sampling, critical, tolerance=1e-5).value
    elif lr < update.edge(family.lambda_max):
        growth = noise_gain(family, lr, sampling, update, tolerance=1e-3)[0].value
    else:
        growth = math.inf
    return math.log(growth) if growth > 0 else -math.inf
