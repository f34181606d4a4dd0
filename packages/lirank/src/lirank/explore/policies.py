r"""Policies: how a request's candidates are scored when clicks are to be earned and learned from.

A request is a set of candidates with features $\phi$ of the last hidden layer. Greedy scores by the mean, UCB by
$\mu^\top \phi + \alpha \sqrt{\phi^\top A^{-1} \phi}$, Thompson sampling by $w^\top \phi$ with one draw $w$ of the
posterior per request: one per candidate would explore far more than the belief warrants.

Sources: LiRank, arXiv 2402.06859, section 4.3; Li et al., arXiv 1003.0146 (LinUCB); Agrawal and Goyal, arXiv 1209.3352.
"""

import torch
from core_tensor.checks import check_number, check_tensor
from torch import Tensor

from lirank.explore.posterior import Posterior

_MOST_DRAWS_AT_ONCE = 1 << 22
"""Scores of a block of draws, so that memory stays bounded."""


def greedy(posterior: Posterior, features: Tensor) -> Tensor:
    """Scores that only exploit.

    Args:
        posterior: The belief about the last layer.
        features: Candidates, shape (n, d).

    Returns:
        Scores, shape (n,), float64.
    """
    return posterior.score(features)


def upper_confidence(posterior: Posterior, features: Tensor, alpha: float = 1.0) -> Tensor:
    """Optimistic scores (UCB).

    Args:
        posterior: The belief about the last layer.
        features: Candidates, shape (n, d).
        alpha: Standard deviations added to the mean.

    Returns:
        Scores, shape (n,), float64.
    """
    check_number("alpha", alpha, low=0)
    return posterior.score(features) + alpha * posterior.variance(features).sqrt()


def thompson(
    posterior: Posterior, features: Tensor, requests: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Scores under weights that are drawn once per request.

    Args:
        posterior: The belief about the last layer.
        features: Candidates of all requests, shape (n, d).
        requests: Number of the request of every candidate, shape (n,), int64, from 0; None for one request.
        generator: Source of randomness.

    Returns:
        Scores, shape (n,), float64.

    Raises:
        ValueError: If a request's number is negative.
    """
    check_tensor("features", features, shape=(None, len(posterior.mean)))
    if requests is None:
        return features.double() @ posterior.sample(1, generator)[0]
    check_tensor("requests", requests, shape=(len(features),), dtype=torch.int64)
    if not len(requests):
        return features.new_zeros(0, dtype=torch.float64)
    if int(requests.min()) < 0:
        raise ValueError("requests: expected numbers from 0")
    _, dense = requests.unique(return_inverse=True)  # so that a number of 2**40 draws no 2**40 weights
    draws = posterior.sample(int(dense.max()) + 1, generator)
    return (features.double() * draws[dense]).sum(1)


def first_place_probabilities(
    posterior: Posterior, features: Tensor, draws: int = 1000, generator: torch.Generator | None = None
) -> Tensor:
    """Probability that Thompson sampling puts each candidate of one request first: the propensities to log.

    Args:
        posterior: The belief about the last layer.
        features: Candidates of one request, shape (n, d).
        draws: Posterior draws; the standard error of a probability is at most 0.5 / sqrt(draws).
        generator: Source of randomness.

    Returns:
        Probabilities, shape (n,), sum 1. Each candidate counts as if it had won once more than it did, so none has the
        zero that would divide an estimator.
    """
    check_tensor("features", features, shape=(None, len(posterior.mean)), nonempty=True)
    check_number("draws", draws, low=1, integer=True)
    phi, left, wins = features.double(), draws, torch.ones(len(features), dtype=torch.float64)
    while left:
        block = min(left, max(1, _MOST_DRAWS_AT_ONCE // len(phi)))
        winners = (posterior.sample(block, generator) @ phi.T).argmax(1)
        wins += torch.bincount(winners, minlength=len(phi))
        left -= block
    return wins / wins.sum()
