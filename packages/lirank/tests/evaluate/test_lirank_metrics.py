import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lirank.evaluate.calibration import fit_curve, pava
from lirank.evaluate.compare import compare
from lirank.evaluate.metrics import (
    auc,
    auc_interval,
    calibration_error,
    calibration_ratio,
    gauc,
    logloss,
    normalized_entropy,
    report,
)
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import log_loss, roc_auc_score

ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(1, 3), st.integers(0, 3)), min_size=2, max_size=40
)


def columns(rows):
    s, y, w, g = (np.array(c, dtype=np.float64) for c in zip(*rows, strict=True))
    return s / 6 + 0.05, y, w, g


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_auc_and_logloss_are_those_of_sklearn(rows):
    s, y, w, _ = columns(rows)
    if 0 < y.sum() < len(y):
        assert auc(s, y) == pytest.approx(roc_auc_score(y, s))
        assert auc(s, y, w) == pytest.approx(roc_auc_score(y, s, sample_weight=w))
        assert logloss(s, y, w) == pytest.approx(log_loss(y, s, sample_weight=w))
        constant = np.full(len(y), y.mean())
        assert normalized_entropy(constant, y) == pytest.approx(1.0)
    else:
        assert auc(s, y) is None
        assert normalized_entropy(s, y) is None


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_gauc_is_the_weighted_mean_over_groups(rows):
    s, y, w, g = columns(rows)
    total, value, used = 0.0, 0.0, 0.0
    for group in np.unique(g):
        mine = g == group
        total += w[mine].sum()
        if 0 < y[mine].sum() < mine.sum():
            value += w[mine].sum() * roc_auc_score(y[mine], s[mine], sample_weight=w[mine])
            used += w[mine].sum()
    found, share = gauc(s, y, g, w)
    assert share == pytest.approx(used / total)
    assert (found is None) == (used == 0)
    if found is not None:
        assert found == pytest.approx(value / used)


def test_validation_without_positives_says_so():  # xlearn#217
    found = report(np.array([0.1, 0.2]), np.zeros(2), np.array([1, 2]))
    assert found["auc"] is None
    assert found["gauc"] is None
    assert found["normalized_entropy"] is None
    assert found["calibration_ratio"] is None
    assert found["reason"] == "all 2 labels are 0"
    found = report(np.array([0.1, 0.2]), np.array([0.0, 1.0]), np.array([1, 2]))
    assert (found["auc"], found["gauc"], found["reason"]) == (1.0, None, "no group has both classes")
    assert report(np.zeros(1), np.array([np.nan]))["reason"] == "no row has this label"


def test_calibration_measures():
    rng = np.random.default_rng(0)
    p = rng.random(100_000)
    y = (rng.random(100_000) < p).astype(float)
    assert calibration_error(p, y) < 0.01
    assert calibration_error(np.sqrt(p), y) > 0.1
    assert calibration_ratio(p / 2, y) == pytest.approx(0.5, abs=0.01)


def test_intervals_cover_and_the_paired_one_is_narrower():
    rng = np.random.default_rng(0)
    y = (rng.random(4000) < 0.3).astype(float)
    s = y + rng.normal(0, 1.5, 4000)
    better = s + 0.3 * y
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    groups = rng.integers(200, size=4000)
    interval = auc_interval(s, y, groups, draws=200)
    assert interval.low < interval.value < interval.high
    paired = compare(sigmoid(better), sigmoid(s), y, groups, draws=200)
    assert 0 < paired.auc.low < paired.auc.value < paired.auc.high
    assert paired.auc.high - paired.auc.low < interval.high - interval.low
    assert auc_interval(s, np.zeros(4000)) is None
    with pytest.raises(ValueError, match="both classes"):
        compare(s, s, np.zeros(4000))


# --- calibration


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_pava_is_isotonic_regression(rows):
    x, y, w, _ = columns(rows)
    at, value, mass = pava(x, y, w)
    expected = IsotonicRegression().fit_transform(x, y, sample_weight=w)
    assert mass.sum() == pytest.approx(w.sum())
    assert (np.diff(value) > 0).all()
    found = value[np.searchsorted(np.maximum.accumulate(_tops(x, y, w, at, value)), x)]
    assert np.allclose(found, expected)


def _tops(x, y, w, at, value):
    """Greatest x of every block, from sklearn's own fit."""
    expected = IsotonicRegression().fit_transform(x, y, sample_weight=w)
    return np.array([x[np.isclose(expected, v)].max() for v in value])


@pytest.mark.parametrize("method", ["shift", "platt", "isotonic"])
def test_curves_recover_a_distortion(method):
    rng = np.random.default_rng(0)
    truth = rng.normal(-1, 1.5, 40_000)
    y = (rng.random(40_000) < 1 / (1 + np.exp(-truth))).astype(float)
    distorted = {"shift": truth + 1.0, "platt": 2 * truth + 1.0, "isotonic": truth + 0.1 * truth**3}[method]
    curve = fit_curve(distorted, y, method=method, low=-12.0, high=12.0)
    middle = np.abs(truth + 1) < 2
    assert np.abs(curve(distorted) - truth)[middle].mean() < 0.12
    assert (np.diff(curve.values) > 0).all()


def test_ties_do_not_appear_and_order_stays():  # sklearn#23134
    rng = np.random.default_rng(0)
    z = rng.normal(size=3000)
    y = (rng.random(3000) < 0.4).astype(float)  # nothing to learn: PAVA makes long flat steps
    curve = fit_curve(z, y, method="isotonic")
    assert auc(curve(z), y) == pytest.approx(auc(z, y), abs=1e-12)
    assert len(np.unique(curve(z))) == len(np.unique(z))


def test_outside_the_range_nan_inf_and_one_class():
    z, y = np.linspace(-3, 3, 200), (np.arange(200) % 2).astype(float)
    curve = fit_curve(z, y, method="isotonic", low=-5, high=5)
    assert np.isfinite(curve(np.array([-1e6, 1e6]))).all()
    assert np.isnan(curve(np.array([np.nan]))[0])
    with pytest.raises(ValueError, match="finite"):
        fit_curve(np.array([0.0, np.inf]), np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="both classes"):
        fit_curve(z, np.zeros(200))


def test_the_method_follows_the_number_of_positives():
    z = np.random.default_rng(0).normal(size=5000)
    for positives, method in ((10, "shift"), (100, "platt"), (1000, "isotonic")):
        y = np.zeros(5000)
        y[:positives] = 1
        assert fit_curve(z, y).method == method


def test_a_shift_matches_the_base_rate():
    z = np.random.default_rng(0).normal(size=2000)
    y = (np.arange(2000) < 20).astype(float)
    p = 1 / (1 + np.exp(-fit_curve(z, y)(z)))
    assert p.mean() == pytest.approx(0.01, rel=1e-6)


def test_a_few_clicks_move_the_present_curve_and_keep_its_shape():
    rng = np.random.default_rng(0)
    z = rng.normal(size=4000)
    y = (rng.random(4000) < 1 / (1 + np.exp(-(0.4 * z - 4)))).astype(float)
    assert 10 < y[:1000].sum() < 50
    present = fit_curve(z, y, method="platt")
    moved = fit_curve(z[:1000], y[:1000], present=present)
    assert moved.method == "shift"
    change = moved(z) - present(z)
    np.testing.assert_allclose(change, change[0], atol=1e-9)
    assert (1 / (1 + np.exp(-moved(z[:1000])))).mean() == pytest.approx(y[:1000].mean(), rel=1e-6)
