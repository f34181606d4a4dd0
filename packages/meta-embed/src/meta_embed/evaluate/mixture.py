r"""Several predictors mixed per activity: logits weighted by how many events the member had.

$$ z = \sum_j a_j(n) z_j, \qquad a_j(n) \ge 0, \; \sum_j a_j(n) = 1, $$

with weights for each support size fitted on held-back members by log loss. The weights are pulled towards those that
all sizes share, because few members decide about each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from meta_embed.tasks.encode import Array


@dataclass(frozen=True)
class Mixture:
    """Weights by support size.

    Attributes:
        sizes: Support sizes, ascending.
        weights: Weights of the predictors at each size, shape (sizes, predictors), rows sum to one.
    """

    sizes: tuple[int, ...]
    weights: Array

    def at(self, n: Array) -> Array:
        """Weights of members with n events, linear in log(1 + n) between the sizes.

        Args:
            n: Events, shape (R,).

        Returns:
            Shape (R, predictors).
        """
        places = np.log1p(np.asarray(self.sizes, np.float64))
        return np.stack([np.interp(np.log1p(n), places, column) for column in self.weights.T], 1)

    def mix(self, logits: Sequence[Array], n: Array) -> Array:
        """Mixed logits.

        Args:
            logits: One array of shape (R,) per predictor.
            n: Events of each row's member, shape (R,).

        Returns:
            Shape (R,).
        """
        mixed: Array = (self.at(n) * np.stack(list(logits), 1)).sum(1)
        return mixed


def fit_mixture(logits: Mapping[int, Sequence[Array]], y: Mapping[int, Array], pull: float = 0.002) -> Mixture:
    """Fit the weights of every size together.

    Args:
        logits: By support size, one array of shape (R,) per predictor, of held-back members.
        y: Labels by support size, shape (R,).
        pull: Penalty on the squared distance of a size's weights (before the softmax) from those all sizes share.

    Returns:
        The mixture.

    Raises:
        ValueError: If there is no size, or predictors differ in number.
    """
    sizes = tuple(sorted(logits))
    counts = {len(z) for z in logits.values()}
    if not sizes or len(counts) != 1:
        raise ValueError("logits: expected the same predictors at every size, at least one")
    count = counts.pop()
    shared = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    own = torch.zeros(len(sizes), count, dtype=torch.float64, requires_grad=True)
    stacked = [torch.from_numpy(np.stack(list(logits[n]), 1).astype(np.float64)) for n in sizes]
    labels = [torch.from_numpy(y[n].astype(np.float64)) for n in sizes]
    optimizer = torch.optim.LBFGS([shared, own], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        a = (shared + own).softmax(1)
        losses = [
            binary_cross_entropy_with_logits((z * a[i]).sum(1), t)
            for i, (z, t) in enumerate(zip(stacked, labels, strict=True))
        ]
        loss = torch.stack(losses).mean() + pull * own.square().mean() + 1e-4 * shared.square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return Mixture(sizes, (shared + own).softmax(1).numpy())
