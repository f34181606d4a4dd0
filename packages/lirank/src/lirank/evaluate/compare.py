"""Paired comparison of two scorings of the same rows."""

from dataclasses import dataclass

import numpy as np

from lirank.evaluate.metrics import Interval, _SortedScores, bootstrap_weights, logloss


@dataclass(frozen=True)
class Comparison:
    """What the first scoring has over the second.

    Attributes:
        auc: Difference of the AUCs, with its interval.
        logloss: Difference of the loglosses (negative is better), with its interval.
    """

    auc: Interval
    logloss: Interval


def compare(
    ours: np.ndarray,
    theirs: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    draws: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Compare two scorings by a paired bootstrap: both are judged on the same resamples.

    Args:
        ours: Probabilities, shape (n,).
        theirs: Probabilities, shape (n,).
        labels: 0 or 1, shape (n,).
        groups: What is resampled, such as users; None for rows.
        draws: Resamples.
        seed: Seed.
        level: Level of the intervals.

    Returns:
        The differences.

    Raises:
        ValueError: If the labels are all the same.
    """
    a, b = _SortedScores.of(ours, labels), _SortedScores.of(theirs, labels)
    ones = np.ones(len(labels))
    first, second = a.auc(ones), b.auc(ones)
    if first is None or second is None:
        raise ValueError("labels: expected both classes, got one")
    losses = _losses(ours, labels) - _losses(theirs, labels)
    found = []
    for w in bootstrap_weights(groups, len(labels), draws, seed):
        x, y = a.auc(w), b.auc(w)
        if x is not None and y is not None:
            found.append((x - y, float(np.average(losses, weights=w))))
    ends = np.quantile(np.array(found), [(1 - level) / 2, (1 + level) / 2], axis=0)  # (2, 2)
    return Comparison(
        Interval(first - second, float(ends[0, 0]), float(ends[1, 0])),
        Interval(logloss(ours, labels) - logloss(theirs, labels), float(ends[0, 1]), float(ends[1, 1])),
    )


def _losses(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    q = np.clip(p.astype(np.float64), 1e-7, 1 - 1e-7)
    found: np.ndarray = -(labels * np.log(q) + (1 - labels) * np.log1p(-q))
    return found
