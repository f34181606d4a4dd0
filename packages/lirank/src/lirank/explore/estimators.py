r"""What a policy would have earned on the events that another policy logged (off-policy evaluation).

For event i: reward $r_i$, propensity $p_i$ with which the logging policy took the logged action, probability $\pi_i$
with which the policy in question would have, $\rho_i = \pi_i / p_i$, and, for DM and DR, a model's reward $\hat q_i$ of
the logged action and its expectation $\bar q_i$ over the policy's actions.

| estimator | value | |
| --- | --- | --- |
| IPS | $\frac1n \sum \rho_i r_i$ | unbiased; large variance where $\rho$ is large |
| SNIPS | $\sum \rho_i r_i / \sum \rho_i$ | bias of order 1/n; in the range of the rewards |
| DM | $\frac1n \sum \bar q_i$ | as biased as the model |
| DR | $\frac1n \sum \bar q_i + \rho_i (r_i - \hat q_i)$ | unbiased if the propensities or the model are right |

Intervals are normal ones from the influence function of each estimator, over events or over clusters of them (all
events of one user), which are what is independent.

Sources: Dudik, Langford and Li, arXiv 1103.4601 (DR); Swaminathan and Joachims 2015 (SNIPS); Owen 2013, chapter 9
(ratio estimators and the effective sample size).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from core_tensor.checks import check_number, check_tensor
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    r"""An estimated mean reward per event.

    Attributes:
        value: The estimate.
        low: Lower end of the interval.
        high: Upper end.
        standard_error: Of the value.
        effective_events: Events that carry the estimate, $(\sum \rho)^2 / \sum \rho^2$; n for DM.
        clipped: Share of the events whose weight was clipped.
    """

    value: float
    low: float
    high: float
    standard_error: float
    effective_events: float
    clipped: float


@dataclass(frozen=True)
class LoggedEvents:
    r"""Events of a logging policy, seen from the policy in question; checked once.

    Attributes:
        reward: Rewards, shape (n,).
        propensity: Probability of the logged action under the policy that logged, shape (n,), in (0, 1].
        probability: Probability of the logged action under the policy in question, shape (n,), in [0, 1].
        model_logged: A model's reward of the logged action, shape (n,); None without a model.
        model_policy: A model's expected reward under the policy in question, shape (n,); None without a model.
        cluster: What events belong together, such as the user, shape (n,), int64; None if each is on its own.
        clip: Largest weight $\rho$; infinite for no clipping, which alone leaves IPS and DR unbiased.
    """

    reward: Tensor
    propensity: Tensor
    probability: Tensor
    model_logged: Tensor | None = None
    model_policy: Tensor | None = None
    cluster: Tensor | None = None
    clip: float = math.inf

    def __post_init__(self) -> None:
        """Refuse events that no policy can have logged."""
        check_tensor("reward", self.reward, ndim=1, finite=True, nonempty=True)
        shape = tuple(self.reward.shape)
        for name in ("propensity", "probability", "model_logged", "model_policy"):
            if (value := getattr(self, name)) is not None:
                check_tensor(name, value, shape=shape, finite=True)
        if self.cluster is not None:
            check_tensor("cluster", self.cluster, shape=shape, dtype=torch.int64)
        check_number("clip", self.clip, low=0, open_low=True)
        bad = ~((self.propensity > 0) & (self.propensity <= 1))
        if bool(bad.any()):
            where = int(bad.nonzero()[0])
            raise ValueError(
                f"propensity: expected probabilities in (0, 1], got {float(self.propensity[where]):g} in row {where}; "
                "an action that the logging policy never takes says nothing about it"
            )
        bad = ~((self.probability >= 0) & (self.probability <= 1))
        if bool(bad.any()):
            where = int(bad.nonzero()[0])
            raise ValueError(
                f"probability: expected probabilities in [0, 1], got {float(self.probability[where]):g} in row {where}"
            )

    @property
    def weight(self) -> Tensor:
        r"""Weights $\rho$, clipped, shape (n,), float64."""
        return (self.probability.double() / self.propensity.double()).clamp(max=self.clip)


def ips(events: LoggedEvents, confidence: float = 0.95) -> Estimate:
    """Inverse propensity scoring.

    Args:
        events: The logged events.
        confidence: Coverage of the interval.

    Returns:
        The estimate.
    """
    terms = events.weight * events.reward.double()
    return _estimate(events, terms.mean(), terms - terms.mean(), confidence)


def snips(events: LoggedEvents, confidence: float = 0.95) -> Estimate:
    """Self-normalized inverse propensity scoring.

    Args:
        events: The logged events.
        confidence: Coverage of the interval.

    Returns:
        The estimate.

    Raises:
        ValueError: If the policy takes none of the logged actions.
    """
    weight, reward = events.weight, events.reward.double()
    total = weight.mean()
    if float(total) == 0:
        raise ValueError("probability: expected the policy to take at least one of the logged actions")
    value = (weight * reward).mean() / total
    return _estimate(events, value, weight * (reward - value) / total, confidence)


def direct_method(events: LoggedEvents, confidence: float = 0.95) -> Estimate:
    """The model's own opinion; its interval knows nothing of the model's bias.

    Args:
        events: The logged events, with a model.
        confidence: Coverage of the interval.

    Returns:
        The estimate.
    """
    terms = _model(events)[1]
    return _estimate(events, terms.mean(), terms - terms.mean(), confidence, model_only=True)


def doubly_robust(events: LoggedEvents, confidence: float = 0.95) -> Estimate:
    """The model's opinion, corrected by the weighted errors that it makes on the logged actions.

    Args:
        events: The logged events, with a model that was not fitted to them.
        confidence: Coverage of the interval.

    Returns:
        The estimate.
    """
    logged, policy = _model(events)
    terms = policy + events.weight * (events.reward.double() - logged)
    return _estimate(events, terms.mean(), terms - terms.mean(), confidence)


def _model(events: LoggedEvents) -> tuple[Tensor, Tensor]:
    """The model's two columns in float64."""
    if events.model_logged is None or events.model_policy is None:
        raise ValueError("model_logged, model_policy: expected a model's rewards, got none")
    return events.model_logged.double(), events.model_policy.double()


def _estimate(
    events: LoggedEvents, value: Tensor, influence: Tensor, confidence: float, *, model_only: bool = False
) -> Estimate:
    """Interval from the influence function, summed within clusters."""
    check_number("confidence", confidence, low=0, high=1, open_low=True, open_high=True)
    n = len(influence)
    if events.cluster is not None:
        groups, dense = events.cluster.unique(return_inverse=True)
        influence = torch.zeros(len(groups), dtype=torch.float64).index_add_(0, dense, influence)
    count = len(influence)
    # the correction of one degree of freedom; a single cluster says nothing about the spread
    error = float(influence.square().sum().sqrt()) / n * math.sqrt(count / (count - 1)) if count > 1 else math.inf
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    weight = events.weight
    effective = float(n) if model_only else float(weight.sum() ** 2 / weight.square().sum().clamp_min(1e-300))
    clipped = float((events.probability.double() > events.clip * events.propensity.double()).double().mean())
    return Estimate(float(value), float(value) - half, float(value) + half, error, effective, clipped)
