import dataclasses
import math

import numpy as np
import pytest
import torch
from core_tensor.dev.testing import shared_data
from lirank.explore.estimators import LoggedEvents, direct_method, doubly_robust, ips, snips

ACTIONS = 4
REWARDS = torch.tensor([0.1, 0.3, 0.6, 0.2], dtype=torch.float64)
LOGGING = torch.tensor([0.4, 0.3, 0.1, 0.2], dtype=torch.float64)
POLICY = torch.tensor([0.1, 0.1, 0.7, 0.1], dtype=torch.float64)
TRUTH = float(POLICY @ REWARDS)


def _log(n, seed, model=None, **options):
    generator = torch.Generator().manual_seed(seed)
    action = torch.multinomial(LOGGING, n, replacement=True, generator=generator)
    reward = (torch.rand(n, generator=generator, dtype=torch.float64) < REWARDS[action]).double()
    if model is not None:
        options |= {"model_logged": model[action], "model_policy": (POLICY @ model).expand(n)}
    return LoggedEvents(reward, LOGGING[action], POLICY[action], **options)


@pytest.mark.parametrize("estimator", [ips, snips, doubly_robust])
def test_the_interval_covers_the_truth_as_often_as_it_says(estimator):  # obp#187: SNIPS has one
    wrong_model = torch.tensor([0.5, 0.5, 0.2, 0.1], dtype=torch.float64)
    covered = 0
    for seed in range(400):
        found = estimator(_log(1500, seed, wrong_model))
        covered += found.low <= TRUTH <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_a_right_model_makes_the_doubly_robust_estimate_sharper():
    log = _log(4000, 0, REWARDS)
    assert doubly_robust(log).standard_error < 0.9 * ips(log).standard_error
    assert direct_method(log).value == pytest.approx(TRUTH)


def test_the_logging_policy_evaluates_to_its_own_mean():
    log = _log(1000, 1)
    own = dataclasses.replace(log, probability=log.propensity)
    mean = float(log.reward.mean())
    assert ips(own).value == pytest.approx(mean)
    assert snips(own).value == pytest.approx(mean)
    assert snips(own).standard_error == pytest.approx(float(log.reward.std()) / math.sqrt(1000))
    assert snips(own).effective_events == pytest.approx(1000)


def test_snips_is_equivariant_and_stays_among_the_rewards():
    log = _log(50, 2)
    shifted = dataclasses.replace(log, reward=log.reward + 7)
    assert snips(shifted).value == pytest.approx(snips(log).value + 7)
    assert 0 <= snips(log).value <= 1


def test_events_of_one_user_are_one_observation():
    log = _log(300, 3)
    each = torch.arange(300)
    names = ("reward", "propensity", "probability")
    thrice = LoggedEvents(*(getattr(log, name).repeat(3) for name in names), cluster=each.repeat(3))
    assert ips(thrice).standard_error == pytest.approx(ips(dataclasses.replace(log, cluster=each)).standard_error)
    assert ips(dataclasses.replace(log, cluster=each)).standard_error == pytest.approx(ips(log).standard_error)
    assert ips(dataclasses.replace(log, cluster=torch.zeros_like(each))).high == math.inf


def test_clipping_is_counted():
    log = _log(2000, 4)
    clipped = dataclasses.replace(log, clip=2.0)
    assert ips(clipped).clipped == pytest.approx(float((log.propensity == 0.1).double().mean()))
    assert ips(clipped).value < ips(log).value
    assert ips(log).clipped == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"propensity": 0.0}, r"propensity: expected probabilities in \(0, 1\], got 0 in row 0"),
        ({"propensity": 1.5}, "propensity"),
        ({"propensity": math.nan}, "propensity"),
        ({"probability": -0.1}, "probability"),
        ({"reward": math.inf}, "reward"),
    ],
)
def test_probabilities_that_are_none_are_refused(change, message):  # VW#4536
    columns = {"reward": torch.ones(3), "propensity": torch.full((3,), 0.5), "probability": torch.full((3,), 0.5)}
    for name, value in change.items():
        columns[name][0] = value
    with pytest.raises(ValueError, match=message):
        LoggedEvents(**columns)


def test_what_cannot_be_estimated_is_refused():
    log = LoggedEvents(torch.ones(3), torch.full((3,), 0.5), torch.zeros(3))
    with pytest.raises(ValueError, match="at least one of the logged actions"):
        snips(log)
    with pytest.raises(ValueError, match="expected a model's rewards"):
        doubly_robust(log)
    with pytest.raises(ValueError, match="reward"):
        LoggedEvents(torch.ones(0), torch.ones(0), torch.ones(0))


def test_open_bandit_s_random_log_evaluates_the_logged_thompson_policy():
    """The average click rate of the other log is within the interval (10,000 events each, so it is wide)."""
    pandas = pytest.importorskip("pandas")
    random = pandas.read_csv(shared_data("open_bandit", "random_men.csv.gz"), index_col=0)
    thompson = pandas.read_csv(shared_data("open_bandit", "bts_men.csv.gz"), index_col=0)
    rates = thompson.groupby(["position", "item_id"]).size() / thompson.groupby("position").size()
    probability = np.array([rates.get(key, 0.0) for key in zip(random["position"], random["item_id"], strict=True)])
    log = LoggedEvents(
        *(torch.tensor(x) for x in (random["click"].to_numpy(), random["propensity_score"].to_numpy(), probability))
    )
    found = snips(log)
    assert found.low <= thompson["click"].mean() <= found.high
    assert found.effective_events < len(random)
