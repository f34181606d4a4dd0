"""Metrics of ranking: order (AUC, GAUC), probabilities (logloss, normalized entropy, ECE), with bootstrap intervals."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
_EPS = 1e-7


def auc(scores: Array, labels: Array, weights: Array | None = None) -> float | None:
    """Probability that a positive scores above a negative, ties counting half.

    Args:
        scores: Scores, shape (n,).
        labels: 0 or 1, shape (n,).
        weights: Row weights, shape (n,).

    Returns:
        The AUC; None without both classes.
    """
    return _SortedScores.of(scores, labels).auc(np.ones(len(scores)) if weights is None else weights)


def gauc(scores: Array, labels: Array, groups: Array, weights: Array | None = None) -> tuple[float | None, float]:
    """Mean AUC within groups, weighted by their rows; groups with one class say nothing and are left out.

    Args:
        scores: Scores, shape (n,).
        labels: 0 or 1, shape (n,).
        groups: Group of every row, shape (n,).
        weights: Row weights, shape (n,).

    Returns:
        The mean, None if no group has both classes, and the share of the rows that are in groups with both.
    """
    if len(scores) == 0:
        return None, 0.0
    w = np.ones(len(scores)) if weights is None else weights
    _, group = np.unique(groups, return_inverse=True)
    order = np.lexsort((scores, group))
    g, s, y, w = group[order], scores[order], labels[order], w[order]
    tie = np.concatenate([[True], (g[1:] != g[:-1]) | (s[1:] != s[:-1])])
    start = np.flatnonzero(tie)
    pos, neg = np.add.reduceat(w * y, start), np.add.reduceat(w * (1 - y), start)  # per group and score
    owner = g[start]
    below = np.cumsum(neg) - neg
    first = np.concatenate([[True], owner[1:] != owner[:-1]])
    below -= below[first][np.cumsum(first) - 1]
    count = int(owner[-1]) + 1
    wins = np.bincount(owner, pos * (below + neg / 2), count)
    p, n = np.bincount(owner, pos, count), np.bincount(owner, neg, count)
    both = (p > 0) & (n > 0)
    total = float((p + n).sum())
    if not both.any():
        return None, 0.0
    rows = (p + n)[both]
    return float((wins[both] / (p * n)[both] * rows).sum() / rows.sum()), float(rows.sum()) / total


def logloss(p: Array, labels: Array, weights: Array | None = None) -> float:
    """Mean negative log-likelihood, with probabilities kept 1e-7 from 0 and 1."""
    q = np.clip(p, _EPS, 1 - _EPS)
    return float(np.average(-(labels * np.log(q) + (1 - labels) * np.log1p(-q)), weights=weights))


def normalized_entropy(p: Array, labels: Array, weights: Array | None = None) -> float | None:
    """Logloss over that of the constant base rate; None if all labels are the same."""
    rate = float(np.average(labels, weights=weights))
    if not 0 < rate < 1:
        return None
    return logloss(p, labels, weights) / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))


def calibration_error(p: Array, labels: Array, weights: Array | None = None, bins: int = 20) -> float:
    """Expected calibration error: mean |predicted - observed| over bins of equal mass."""
    w = np.ones(len(p)) if weights is None else weights
    order = np.argsort(p, kind="stable")
    mass = np.cumsum(w[order]) - w[order] / 2
    bin_ = np.minimum((mass / w.sum() * bins).astype(int), bins - 1)
    gap = np.bincount(bin_, (w * (p - labels))[order], bins)
    return float(np.abs(gap).sum() / w.sum())


def calibration_ratio(p: Array, labels: Array, weights: Array | None = None) -> float | None:
    """Predicted over observed positives; 1 is right, None without positives."""
    w = np.ones(len(p)) if weights is None else weights
    positives = float((w * labels).sum())
    return float((w * p).sum()) / positives if positives > 0 else None


def report(p: Array, labels: Array, groups: Array | None = None, weights: Array | None = None) -> dict[str, Any]:
    """All metrics of one label; what is undefined is None, with the reason beside it.

    Args:
        p: Probabilities, shape (n,).
        labels: 0, 1 or NaN (left out), shape (n,).
        groups: Ranking groups, shape (n,).
        weights: Row weights, shape (n,).

    Returns:
        Metrics by name.
    """
    known = ~np.isnan(labels)
    p, labels = p[known].astype(np.float64), labels[known]
    groups = None if groups is None else groups[known]
    weights = None if weights is None else weights[known]
    found: dict[str, Any] = {"rows": len(p), "positives": int(labels.sum())}
    if len(p) == 0:
        return found | {"auc": None, "logloss": None, "reason": "no row has this label"}
    found |= {
        "auc": auc(p, labels, weights),
        "logloss": logloss(p, labels, weights),
        "normalized_entropy": normalized_entropy(p, labels, weights),
        "calibration_error": calibration_error(p, labels, weights),
        "calibration_ratio": calibration_ratio(p, labels, weights),
    }
    if found["auc"] is None:
        found["reason"] = f"all {len(p)} labels are {int(labels[0])}"
    if groups is not None:
        found["gauc"], found["gauc_rows"] = gauc(p, labels, groups, weights)
        if found["gauc"] is None:
            found.setdefault("reason", "no group has both classes")
    return found


def by_segment(p: Array, labels: Array, segments: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    """The report of every segment.

    Args:
        p: Probabilities, shape (n,).
        labels: Labels, shape (n,).
        segments: Masks by name, shape (n,), bool.

    Returns:
        Reports by name.
    """
    return {name: report(p[mask], labels[mask]) for name, mask in segments.items()}


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def bootstrap_weights(groups: Array | None, n: int, draws: int, seed: int) -> Any:
    """Weights of `draws` resamples, of whole groups where there are some: rows of one user are not independent.

    Args:
        groups: Group of every row, shape (n,); None resamples rows.
        n: Rows.
        draws: Resamples.
        seed: Seed.

    Yields:
        How often each row is in a resample, shape (n,).
    """
    _, owner = (None, np.arange(n)) if groups is None else np.unique(groups, return_inverse=True)
    rng, count = np.random.default_rng(seed), int(owner.max()) + 1
    for _ in range(draws):
        yield np.bincount(rng.integers(count, size=count), minlength=count)[owner].astype(np.float64)


def auc_interval(
    scores: Array, labels: Array, groups: Array | None = None, *, draws: int = 500, seed: int = 0, level: float = 0.95
) -> Interval | None:
    """AUC with its bootstrap interval over groups.

    Args:
        scores: Scores, shape (n,).
        labels: Labels, shape (n,).
        groups: What is resampled, such as users; None for rows.
        draws: Resamples.
        seed: Seed.
        level: Level of the interval.

    Returns:
        The interval; None without both classes.
    """
    sorted_scores = _SortedScores.of(scores, labels)
    value = sorted_scores.auc(np.ones(len(scores)))
    if value is None:
        return None
    found = [sorted_scores.auc(w) for w in bootstrap_weights(groups, len(scores), draws, seed)]
    low, high = np.quantile([v for v in found if v is not None], [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class _SortedScores:
    """Rows by score, sorted once, so that the AUC under other weights costs one pass."""

    order: Array
    labels: Array
    starts: Array

    @classmethod
    def of(cls, scores: Array, labels: Array) -> "_SortedScores":
        order = np.argsort(scores, kind="stable")
        s = scores[order]
        starts = np.flatnonzero(np.concatenate([[True], s[1:] != s[:-1]])) if len(s) else np.zeros(0, np.int64)
        return cls(order, labels[order], starts)

    def auc(self, weights: Array) -> float | None:
        if len(self.starts) == 0:
            return None
        w = weights[self.order]
        pos, neg = np.add.reduceat(w * self.labels, self.starts), np.add.reduceat(w * (1 - self.labels), self.starts)
        p, n = pos.sum(), neg.sum()
        if p <= 0 or n <= 0:
            return None
        return float((pos * (np.cumsum(neg) - neg / 2)).sum() / (p * n))
