import pytest
import torch
from frechet_gan import FeatureStats, debiased_split_distance, estimate_frechet, frechet_distance
from frechet_gan.choices import ESTIMATORS
from frechet_gan.frechet.estimators import standard_error

D = 24
SPECTRUM = torch.arange(1, D + 1, dtype=torch.float64) ** -0.5
OTHER = SPECTRUM * (1 + 0.2 * torch.cos(torch.arange(D, dtype=torch.float64)))
SHIFT = 0.05
TRUTH = float((SPECTRUM - OTHER).square().sum()) + D * SHIFT**2


def _draw(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, dtype=torch.float64, generator=generator) * SPECTRUM
    return x, torch.randn(n, D, dtype=torch.float64, generator=generator) * OTHER + SHIFT


def test_debiased_estimators_remove_the_plug_ins_bias():
    means = {}
    for name in ESTIMATORS:
        errors = [estimate_frechet(*_draw(400, s), name, seed=s).value - TRUTH for s in range(30)]
        means[name] = sum(errors) / len(errors)
    assert means["plugin"] > 0.05
    for name in ("fid_inf", "vale2", "rtd"):
        assert abs(means[name]) < 0.25 * means["plugin"], means


def test_interval_covers_the_truth():
    hits = 0
    for seed in range(60):
        found = estimate_frechet(*_draw(2000, seed), "rtd", confidence=0.9, seed=seed)
        hits += found.low <= TRUTH <= found.high
    assert 46 <= hits <= 60


@pytest.mark.parametrize("scale", [1.0, 1.05, 1.5])  # distance zero, small, large
@pytest.mark.parametrize("tails", ["gaussian", "relu"])
def test_interval_covers_at_any_distance(scale, tails):
    def draw(seed):
        z = torch.randn(600, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return z if tails == "gaussian" else (z.clamp_min(0) - 0.3989422804) / 0.5838119895

    truth = 16 * (scale - 1) ** 2
    hits = 0
    for seed in range(80):
        found = estimate_frechet(draw(seed), draw(10_000 + seed) * scale, "rtd", seed=seed)
        hits += found.low <= truth <= found.high
    assert hits >= 70  # 95 % of 80 are 76; fewer than 70 has a chance below one in a thousand


@pytest.mark.parametrize("name", ["plugin", "fid_inf", "vale2"])
def test_estimators_without_an_honest_interval_give_none(name):
    found = estimate_frechet(*_draw(100, 0), name)
    assert found.low is None
    assert found.high is None


def test_standard_error_equals_the_spread_over_samples():
    values = torch.tensor([float(frechet_distance(*_draw(800, s))) for s in range(80)])
    claimed = sum(standard_error(*_draw(800, s)) for s in range(10)) / 10
    assert 0.7 < claimed / float(values.std()) < 1.4


@pytest.mark.parametrize("name", ESTIMATORS)
def test_exact_reference(name):
    reference = FeatureStats.from_moments(torch.zeros(D, dtype=torch.float64), torch.diag(SPECTRUM.square()), 10**9)
    errors = [estimate_frechet(_draw(800, s)[1], reference, name, seed=s).value - TRUTH for s in range(40)]
    mean = sum(errors) / 40
    assert 0.018 < mean < 0.03 if name == "plugin" else abs(mean) < 0.006


def test_same_seed_same_estimate():
    x, y = _draw(100, 0)
    assert estimate_frechet(x, y, "rtd", seed=3) == estimate_frechet(x, y, "rtd", seed=3)
    assert estimate_frechet(x, y, "rtd", seed=3) != estimate_frechet(x, y, "rtd", seed=4)


def test_fewer_rows_than_features_stay_finite():
    x, y = _draw(17, 1)
    for name in ("plugin", "fid_inf", "vale2"):
        assert abs(estimate_frechet(x, y, name).value) < 1e3
    with pytest.raises(ValueError, match="expected at least 34 samples for rtd, got 17"):
        estimate_frechet(x, y, "rtd")


def test_split_form_has_less_bias_than_the_plug_in():
    plain, split = 0.0, 0.0
    for seed in range(40):
        (x, y), (x2, y2) = _draw(60, seed), _draw(60, seed + 1000)
        y.requires_grad_()
        plain += float(frechet_distance(x, y).detach()) - TRUTH
        value = debiased_split_distance(x, x2, y, y2)
        value.backward()
        assert torch.isfinite(y.grad).all()
        split += float(value.detach()) - TRUTH
    assert abs(split) < 0.25 * plain


@pytest.mark.parametrize(("name", "rows"), [("plugin", 1), ("fid_inf", 15), ("vale2", 7), ("rtd", 33)])
def test_too_few_rows(name, rows):
    x, y = _draw(rows, 0)
    with pytest.raises(ValueError, match="expected at least"):
        estimate_frechet(x, y, name)


def test_bad_options():
    x, y = _draw(20, 0)
    with pytest.raises(ValueError, match="estimator: expected one of"):
        estimate_frechet(x, y, "median")
    with pytest.raises(ValueError, match="confidence: "):
        estimate_frechet(x, y, confidence=1.0)
