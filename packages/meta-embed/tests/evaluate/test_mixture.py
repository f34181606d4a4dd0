import numpy as np
import pytest
from meta_embed.evaluate.mixture import Mixture, fit_mixture


def _world(weights, rows=20_000, seed=0):
    """Two predictors, and labels drawn from their mixture at each size."""
    rng = np.random.default_rng(seed)
    logits = {n: (1.5 * rng.standard_normal(rows), 1.5 * rng.standard_normal(rows)) for n in weights}
    y = {
        n: (rng.random(rows) < 1 / (1 + np.exp(-(a * logits[n][0] + (1 - a) * logits[n][1])))).astype(np.float32)
        for n, a in weights.items()
    }
    return logits, y


def test_weights_are_found_per_size():
    truth = {4: 0.15, 16: 0.5, 32: 0.8}
    logits, y = _world(truth)
    found = fit_mixture(logits, y)
    assert found.sizes == (4, 16, 32)
    # 20,000 rows of spread 1.5 * sqrt(2) tell a weight to about 0.01; the pull moves it by less than that again
    np.testing.assert_allclose(found.weights[:, 0], list(truth.values()), atol=0.05)
    np.testing.assert_allclose(found.weights.sum(1), 1.0)


def test_a_size_with_little_to_say_follows_the_others():
    truth = {4: 0.8, 16: 0.8, 32: 0.8}
    logits, y = _world(truth)
    logits[16], y[16] = tuple(z[:4] for z in logits[16]), 1.0 - (logits[16][0][:4] > 0)
    pulled = fit_mixture(logits, y, pull=1.0)
    free = fit_mixture(logits, y, pull=1e-6)
    assert abs(pulled.weights[1, 0] - 0.8) < abs(free.weights[1, 0] - 0.8)


def test_between_sizes_weights_are_linear_in_the_logarithm():
    mixture = Mixture((0, 3, 15), np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
    at = mixture.at(np.array([0, 1, 3, 7, 15, 99]))
    np.testing.assert_allclose(at[:, 1], [0, 0.25, 0.5, 0.75, 1, 1])
    z = mixture.mix((np.full(2, 10.0), np.full(2, 20.0)), np.array([0, 7]))
    np.testing.assert_allclose(z, [10.0, 17.5])


def test_predictors_must_be_the_same_at_every_size():
    one, two = np.zeros(3), np.ones(3)
    with pytest.raises(ValueError, match="expected the same predictors"):
        fit_mixture({1: (one,), 2: (one, two)}, {1: one, 2: two})
    with pytest.raises(ValueError, match="expected the same predictors"):
        fit_mixture({}, {})
