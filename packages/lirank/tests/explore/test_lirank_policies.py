import math

import pytest
import torch
from lirank.explore.policies import first_place_probabilities, greedy, thompson, upper_confidence
from lirank.explore.posterior import GaussianPosterior, LogisticPosterior


def _belief(d=2):
    return GaussianPosterior.prior(d, mean=torch.arange(1.0, d + 1))


def test_scores_are_mean_and_spread():
    phi = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert greedy(_belief(), phi).tolist() == [1.0, 4.0]
    assert upper_confidence(_belief(), phi, 2.0).tolist() == [3.0, 8.0]
    assert upper_confidence(_belief(), phi, 0.0).tolist() == [1.0, 4.0]


def test_one_draw_serves_a_whole_request():
    phi = torch.ones(6, 2)
    requests = torch.tensor([7, 7, 2**40, 2**40, 7, 0])
    scores = thompson(_belief(), phi, requests, torch.Generator().manual_seed(0))
    assert scores[0] == scores[1] == scores[4]
    assert scores[2] == scores[3]
    assert len(scores.unique()) == 3
    alone = thompson(_belief(), phi, generator=torch.Generator().manual_seed(0))
    assert len(alone.unique()) == 1
    assert thompson(_belief(), phi[:0], requests[:0]).shape == (0,)
    with pytest.raises(ValueError, match="requests"):
        thompson(_belief(), phi, -requests)


def test_two_candidates_have_the_probability_of_the_normal_law():
    belief = GaussianPosterior.prior(2, mean=torch.tensor([0.5, 0.0]))
    found = first_place_probabilities(belief, torch.eye(2), 200_000, torch.Generator().manual_seed(0))
    expected = 0.5 * (1 + math.erf(0.5 / math.sqrt(2) / math.sqrt(2)))  # the difference is N(0.5, 2)
    assert float(found[0]) == pytest.approx(expected, abs=5e-3)
    assert float(found.sum()) == pytest.approx(1)


def test_no_candidate_gets_propensity_zero():
    belief = GaussianPosterior.prior(1, 1e6, mean=torch.tensor([1.0]))
    found = first_place_probabilities(belief, torch.tensor([[100.0], [-100.0]]), 50, torch.Generator().manual_seed(0))
    assert found.tolist() == [51 / 52, 1 / 52]


def _regret(policy, rounds=400, seed=0):
    """Cumulative regret of a policy on a logistic bandit with twenty arms that share five features."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(5, generator=generator, dtype=torch.float64)
    belief, regret = LogisticPosterior.prior(5), 0.0
    for _ in range(rounds):
        arms = torch.randn(20, 5, generator=generator, dtype=torch.float64)
        rates = torch.sigmoid(arms @ truth - 1)
        chosen = int(policy(belief, arms, generator).argmax())
        regret += float(rates.max() - rates[chosen])
        click = (torch.rand((), generator=generator, dtype=torch.float64) < rates[chosen]).double()[None]
        belief = belief.updated(arms[[chosen]], click, offset=torch.tensor([-1.0], dtype=torch.float64))
    return regret


def test_thompson_sampling_learns_a_bandit():
    sampled = sum(_regret(lambda b, x, g: thompson(b, x, generator=g), seed=s) for s in range(5))
    random = sum(_regret(lambda b, x, g: torch.rand(len(x), generator=g), seed=s) for s in range(5))
    assert sampled < 0.25 * random
    # most of the regret comes early
    early = sum(_regret(lambda b, x, g: thompson(b, x, generator=g), rounds=100, seed=s) for s in range(5))
    assert sampled - early < 1.5 * early
