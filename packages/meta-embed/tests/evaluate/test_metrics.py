import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_embed.evaluate.metrics import Scores, auc, log_loss, member_auc, paired_bootstrap, weighted_auc


def _rows(n, seed=0, levels=0):
    rng = np.random.default_rng(seed)
    score = rng.standard_normal(n) if not levels else rng.integers(0, levels, n).astype(float)
    return score, (rng.random(n) < 1 / (1 + np.exp(-score))).astype(np.float32), rng.integers(0, 7, n)


def _pairs(score, y):
    """The definition: the share of pairs of labels that are in order, ties counting half."""
    up, down = score[y > 0.5], score[y <= 0.5]
    return np.mean((up[:, None] > down) + 0.5 * (up[:, None] == down))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(0, 5), st.integers(0, 99))
def test_auc_is_the_share_of_pairs_in_order(n, levels, seed):
    score, y, _ = _rows(n, seed, levels)
    if y.min() == y.max():
        assert np.isnan(auc(score, y))
        return
    assert auc(score, y) == pytest.approx(_pairs(score, y), abs=1e-12)
    times = np.random.default_rng(seed).integers(0, 3, (4, n)).astype(float)
    for w, area in zip(times, weighted_auc(score, y, times), strict=True):
        rows = np.repeat(np.arange(n), w.astype(int))
        both = len(rows) and y[rows].min() < y[rows].max()
        assert area == pytest.approx(_pairs(score[rows], y[rows]), abs=1e-12) if both else np.isnan(area)


def test_figures_are_sklearns():
    metrics = pytest.importorskip("sklearn.metrics")
    score, y, owner = _rows(500, levels=6)
    assert auc(score, y) == pytest.approx(metrics.roc_auc_score(y, score), abs=1e-12)
    assert log_loss(score, y) == pytest.approx(metrics.log_loss(y, 1 / (1 + np.exp(-score))), abs=1e-9)
    own = [metrics.roc_auc_score(y[owner == m], score[owner == m]) for m in range(7)]
    sizes = [(owner == m).sum() for m in range(7)]
    assert member_auc(score, y, owner) == pytest.approx(np.average(own, weights=sizes), abs=1e-12)


def test_members_of_one_label_have_no_area_of_their_own():
    score, y = np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 1, 1])
    assert member_auc(score, y, np.array([0, 0, 1, 1])) == 1.0
    assert np.isnan(member_auc(score[2:], y[2:], np.array([0, 1])))


def test_log_loss_of_extreme_logits():
    assert log_loss(np.array([1e4, -1e4]), np.array([1.0, 1.0])) == 5e3


def _parts(seed, noise):
    score, y, owner = _rows(300, seed)
    rng = np.random.default_rng(seed + 50)
    return Scores(score, y, owner), Scores(score + noise * rng.standard_normal(300), y, owner)


def test_the_bootstrap_draws_members_with_all_their_rows():
    """The same draws of members, with their rows written out."""
    ours, peer = zip(*(_parts(seed, 1.0) for seed in (0, 1)), strict=True)
    found = paired_bootstrap(ours, peer, draws=60, seed=3)
    rng, samples = np.random.default_rng(3), np.zeros(60)
    for one, other in zip(ours, peer, strict=True):
        times = rng.multinomial(7, np.full(7, 1 / 7), size=60)
        for b in range(60):
            rows = np.repeat(np.arange(300), times[b, one.owner])
            samples[b] += (_pairs(one.logit[rows], one.y[rows]) - _pairs(other.logit[rows], one.y[rows])) / 2
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(samples, [2.5, 97.5])), abs=1e-12)
    gains = [_pairs(a.logit, a.y) - _pairs(b.logit, b.y) for a, b in zip(ours, peer, strict=True)]
    assert found.value == pytest.approx(np.mean(gains), abs=1e-12)
    assert found.low < found.value < found.high


def test_a_predictor_does_not_differ_from_itself():
    one, _ = _parts(0, 1.0)
    found = paired_bootstrap([one], [one], draws=20)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_scores_of_other_rows_are_refused():
    one, _ = _parts(0, 1.0)
    with pytest.raises(ValueError, match="expected scores of the same rows"):
        paired_bootstrap([one], [Scores(one.logit[::-1], one.y[::-1], one.owner[::-1])])
