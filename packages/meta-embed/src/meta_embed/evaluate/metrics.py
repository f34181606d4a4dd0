"""AUC, log loss and their paired bootstrap over members."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meta_embed.tasks.encode import Array


def auc(score: Array, y: Array) -> float:
    """Area under the ROC curve of binary labels; ties count half.

    Args:
        score: Scores, shape (N,).
        y: Labels 0 or 1, shape (N,).

    Returns:
        The area; NaN where one of the labels is absent.
    """
    positive = y > 0.5
    n, m = int(positive.sum()), int((~positive).sum())
    if n == 0 or m == 0:
        return float("nan")
    values, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    del values
    rank = (counts.cumsum() - (counts - 1) / 2.0)[inverse]  # mean rank of ties, from 1
    return float((rank[positive].sum() - n * (n + 1) / 2.0) / (n * m))


def log_loss(logit: Array, y: Array) -> float:
    """Mean log loss.

    Args:
        logit: Logits, shape (N,).
        y: Labels, shape (N,).

    Returns:
        The mean, in nats.
    """
    return float(np.mean(np.logaddexp(0.0, logit) - y * logit))


def member_auc(score: Array, y: Array, owner: Array) -> float:
    """Mean over members of their own AUC, weighted by their rows; members with one label only are left out (GAUC).

    Args:
        score: Scores, shape (N,).
        y: Labels, shape (N,).
        owner: Member of every row, shape (N,).

    Returns:
        The mean; NaN where no member has both labels.
    """
    order = np.argsort(owner, kind="stable")
    cuts = np.flatnonzero(np.diff(owner[order])) + 1
    total = weight = 0.0
    for rows in np.split(order, cuts):
        own = auc(score[rows], y[rows])
        if np.isfinite(own):
            total, weight = total + len(rows) * own, weight + len(rows)
    return total / weight if weight else float("nan")


@dataclass(frozen=True)
class Scores:
    """Logits of query rows.

    Attributes:
        logit: Shape (R,).
        y: Labels, shape (R,).
        owner: Position of each row's member, shape (R,).
    """

    logit: Array
    y: Array
    owner: Array

    def figures(self) -> dict[str, float]:
        """AUC, log loss and the mean AUC within members."""
        return {
            "auc": auc(self.logit, self.y),
            "logloss": log_loss(self.logit, self.y),
            "member_auc": member_auc(self.logit, self.y, self.owner),
        }


def weighted_auc(score: Array, y: Array, weights: Array) -> Array:
    """Areas under the ROC curve where rows count more than once or not at all; ties count half.

    Args:
        score: Scores, shape (N,).
        y: Labels 0 or 1, shape (N,).
        weights: One row of weights per area, shape (B, N).

    Returns:
        Shape (B,); NaN where one of the labels has no weight.
    """
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # first of each run of ties
    positive = y[order] > 0.5
    w = weights[:, order]
    up = np.add.reduceat(np.where(positive, w, 0.0), starts, axis=1)  # (B, distinct scores)
    down = np.add.reduceat(np.where(positive, 0.0, w), starts, axis=1)
    below = down.cumsum(1) - 0.5 * down
    with np.errstate(invalid="ignore"):
        area: Array = (up * below).sum(1) / (up.sum(1) * down.sum(1))
    return area


@dataclass(frozen=True)
class Difference:
    """A difference with its 95 % interval.

    Attributes:
        value: Of all members, each once.
        low: 2.5 % quantile over the draws.
        high: 97.5 % quantile.
    """

    value: float
    low: float
    high: float


def paired_bootstrap(ours: Sequence[Scores], peer: Sequence[Scores], draws: int = 1000, seed: int = 0) -> Difference:
    """Difference of two predictors' AUC, with an interval over members.

    Each part has models of its own, so areas are taken within a part and averaged over the parts; members are drawn
    with replacement within their part, the same for both predictors.

    Args:
        ours: Scores, one entry per part.
        peer: Scores of the same rows.
        draws: Samples of members.
        seed: Seed.

    Returns:
        Mean difference over the parts.

    Raises:
        ValueError: If the two did not score the same rows.
    """
    rng = np.random.default_rng(seed)
    values, samples = [], np.zeros(draws)
    for one, other in zip(ours, peer, strict=True):
        if not (np.array_equal(one.y, other.y) and np.array_equal(one.owner, other.owner)):
            raise ValueError("peer: expected scores of the same rows in the same order")
        _, owner = np.unique(one.owner, return_inverse=True)
        members = int(owner.max()) + 1
        times = rng.multinomial(members, np.full(members, 1 / members), size=draws)  # (draws, members)
        values.append(auc(one.logit, one.y) - auc(other.logit, other.y))
        step = max(1, 4_000_000 // len(owner))  # bounds the memory
        for first in range(0, draws, step):
            w = times[first : first + step, owner].astype(np.float64)
            gain = weighted_auc(one.logit, one.y, w) - weighted_auc(other.logit, other.y, w)
            samples[first : first + step] += gain / len(ours)
    low, high = np.nanpercentile(samples, [2.5, 97.5]) if np.isfinite(samples).any() else (np.nan, np.nan)
    return Difference(float(np.mean(values)), float(low), float(high))
