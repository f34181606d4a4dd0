"""AUC, log loss and their paired bootstrap over members."""

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


def paired_bootstrap(
    ours: Array, peer: Array, y: Array, owner: Array, draws: int = 500, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two AUCs on the same rows, with a 95 % interval over members.

    Args:
        ours: Scores, shape (N,).
        peer: Scores, shape (N,).
        y: Labels, shape (N,).
        owner: Member of every row, shape (N,).
        draws: Samples of members, with replacement.
        seed: Seed.

    Returns:
        The difference and the ends of its interval.
    """
    rng = np.random.default_rng(seed)
    order = np.argsort(owner, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)
    found = []
    for _ in range(draws):
        rows = np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        found.append(auc(ours[rows], y[rows]) - auc(peer[rows], y[rows]))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return auc(ours, y) - auc(peer, y), float(low), float(high)
