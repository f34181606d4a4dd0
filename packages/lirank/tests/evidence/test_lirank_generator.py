import dataclasses

import numpy as np
import pytest
from lirank.evidence.generator import PRESETS, Market, generate, without
from lirank.schema.features import History, Id, Popularity
from sklearn.metrics import roc_auc_score

SMALL = Market(users=300, items=200, events=20_000)


def _column(table, name):
    return table[name].to_numpy()


@pytest.mark.parametrize("name", PRESETS)
def test_labels_follow_their_probabilities(name):
    made = generate(dataclasses.replace(PRESETS[name], users=500, items=300, events=40_000))
    assert set(made.truth.column_names) == {label.name for label in made.schema.labels}
    assert set(made.schema.columns()) <= set(made.log.column_names)
    if made.schema.sampling == 1:
        for label in made.truth.column_names:
            p, y = _column(made.truth, label), _column(made.log, label)
            assert abs((y - p).sum()) < 4 * np.sqrt((p * (1 - p)).sum())  # mean
            top = p >= np.quantile(p, 0.9)
            assert abs((y - p)[top].sum()) < 4 * np.sqrt((p * (1 - p))[top].sum())  # calibration at the top
            assert 0.55 < roc_auc_score(y, p) < 0.999


def test_the_same_market_is_the_same_log_in_order_of_time():
    assert generate(SMALL).log.equals(generate(SMALL).log)
    assert not generate(SMALL).log.equals(generate(dataclasses.replace(SMALL, seed=1)).log)
    assert (np.diff(_column(generate(SMALL).log, "time")) >= 0).all()


def test_the_rate_is_about_what_was_asked():
    for rate in (0.02, 0.3, 0.7):
        found = _column(generate(dataclasses.replace(SMALL, rate=rate)).log, "click").mean()
        assert found == pytest.approx(rate, rel=0.15)


def _bayes(**knobs):
    made = generate(dataclasses.replace(SMALL, **knobs))
    return roc_auc_score(_column(made.log, "click"), _column(made.truth, "click"))


@pytest.mark.parametrize("knob", ["crosses", "history", "drift", "ids"])
def test_a_knob_adds_something_to_learn(knob):
    assert _bayes(**{"ids": 0.0, knob: 1.5}) > _bayes(ids=0.0) + 0.01


def test_with_all_knobs_at_zero_only_numbers_matter():
    made = generate(dataclasses.replace(SMALL, ids=0.0))
    p = _column(made.truth, "click")
    logit = np.log(p / (1 - p))
    x = np.stack([np.log(_column(made.log, "price")), _column(made.log, "age"), _column(made.log, "quality")], 1)
    residual = logit - np.c_[x, np.ones(len(x))] @ np.linalg.lstsq(np.c_[x, np.ones(len(x))], logit, rcond=None)[0]
    assert np.abs(residual).max() < 1e-9


def test_history_is_the_last_clicks_of_the_user_and_nothing_later():
    """The logit of a user's first event does not depend on the history knob; later ones do."""
    plain, moved = (generate(dataclasses.replace(SMALL, history=k)) for k in (0.0, 1.0))
    user = _column(plain.log, "user")
    _, first = np.unique(user, return_index=True)
    difference = _column(moved.truth, "click") - _column(plain.truth, "click")
    assert np.abs(difference[first]).max() < 1e-12
    assert np.abs(np.delete(difference, first)).max() > 0.01


def test_positions_scale_the_probability():
    plain, shown = (generate(dataclasses.replace(SMALL, position=k)) for k in (0.0, 0.5))
    expected = _column(plain.truth, "click") * (1.0 + _column(shown.log, "position")) ** -0.5
    np.testing.assert_allclose(_column(shown.truth, "click"), expected, rtol=1e-12)


def test_sampled_negatives_are_the_share_that_was_asked():
    full, kept = (generate(dataclasses.replace(SMALL, negatives=w)) for w in (1.0, 0.1))
    y, z = _column(full.log, "click"), _column(kept.log, "click")
    assert z.sum() == y.sum()
    assert (1 - z).sum() == pytest.approx(0.1 * (1 - y).sum(), rel=0.1)
    assert kept.schema.sampling == 0.1


def test_cold_users_and_items_appear_late():
    made = generate(dataclasses.replace(SMALL, cold=0.5))
    half = made.log.num_rows // 2
    early, late = (set(_column(made.log.slice(a, half), "item")) for a in (0, half))
    assert len(late - early) > 10 * len(early - late) / 4


def test_an_ablation_leaves_features_out():
    schema = generate(dataclasses.replace(SMALL, history=1.0)).schema
    assert not without(schema, History, Popularity).of(History, Popularity)
    assert "hour" not in [f.name for f in without(schema, names=("hour",)).of(Id)]


@pytest.mark.parametrize("change", [{"rate": 0.0}, {"users": 0}, {"history": -1.0}, {"negatives": 0.0}, {"cold": 1.0}])
def test_markets_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Market(**change)
