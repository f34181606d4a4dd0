"""The stability map over batch size and learning rate, the paper's picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sgd_stability.report.plots import plot_map
from sgd_stability.theory.dynamics import Update
from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.growth import growth_grid
from sgd_stability.theory.sampling import Sampling, Scheme


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
) -> StabilityMap:
    """Evaluate the growth on a grid.

    Args:
        family: The per-sample Hessians.
        n: Size of the data set.
        lrs: Learning rates.
        batch_sizes: Batch sizes.
        scheme: Minibatch scheme.
        update: Update rule.
        curves: Boundary curves to carry along.

    Returns:
        The map.
    """
    samplings = [Sampling(n, batch_size, scheme) for batch_size in batch_sizes]
    growth = growth_grid(family, list(lrs), samplings, update).log()
    return StabilityMap(torch.tensor(lrs, dtype=torch.float64), torch.tensor(batch_sizes), growth, dict(curves), scheme)
