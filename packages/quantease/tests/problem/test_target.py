import numpy as np
import pytest
import torch
from core_tensor.dev.testing import assert_close
from hypothesis import given
from hypothesis import strategies as st
from quantease.problem.gram import GramFolds
from quantease.problem.target import LONGEST, RIDGE, least_squares_shift, shifted_targets


def tokens(n, p, q, *, seed=0, drift=0.3, folds=2):
    """Inputs X, full-precision outputs Z beside the layer's own X W', and the fold of every token."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(p, p, generator=generator, dtype=torch.float64)
    X = torch.randn(n, p, generator=generator, dtype=torch.float64) @ mixing
    W = torch.randn(q, p, generator=generator, dtype=torch.float64)
    hidden = torch.randn(q, p, generator=generator, dtype=torch.float64) * drift  # what a shift can make up for
    R = X @ hidden.T + torch.randn(n, q, generator=generator, dtype=torch.float64)
    return X, W, R, torch.arange(n) % folds


@pytest.mark.parametrize(("n", "p", "q"), [(40, 7, 5), (9, 12, 3), (3, 1, 1)])
def test_shift_is_the_minimum_of_the_ridge_problem(n, p, q):
    """Against numpy's least squares on stacked equations: tokens, and the ridge as further rows."""
    X, _, R, _ = tokens(n, p, q)
    S, t = X.T @ X, RIDGE
    rows = np.concatenate([np.sqrt(1 - t) * X.numpy(), np.diag(np.sqrt(t * S.diagonal().numpy()))])
    right = np.concatenate([np.sqrt(1 - t) * R.numpy(), np.zeros((p, q))])
    expected = np.linalg.lstsq(rows, right, rcond=None)[0].T
    assert_close("shift", torch.from_numpy(expected), least_squares_shift(S, X.T @ R), 1e-9)
    assert_close("shift", torch.from_numpy(expected), least_squares_shift(S.float(), (X.T @ R).float()), 1e-4)


@pytest.mark.parametrize("folds", [2, 3])
def test_factor_is_the_best_multiple_on_held_out_tokens(folds):
    """c minimises what is left on each fold after c times the shift of the others: here by search on the tokens."""
    X, W, R, fold = tokens(60, 8, 4, folds=folds, drift=0.05)
    S = torch.stack([X[fold == f].T @ X[fold == f] for f in range(folds)])
    B = torch.stack([X[fold == f].T @ R[fold == f] for f in range(folds)])
    found = shifted_targets({"a": W[:1], "b": W[1:]}, S, {"a": B[..., :1], "b": B[..., 1:]})

    def left(c):
        total = 0.0
        for f in range(folds):
            others = fold != f
            delta = least_squares_shift(X[others].T @ X[others], X[others].T @ R[others])
            total += float((R[fold == f] - c * X[fold == f] @ delta.T).square().sum())
        return total

    grid = torch.linspace(0, 1, 2001).tolist()
    assert found.factor == pytest.approx(min(grid, key=left), abs=1e-3)
    assert 0 < found.factor < 1
    expected = W + found.factor * least_squares_shift(S.sum(0), B.sum(0))
    assert_close("target", expected, torch.cat([found.weights["a"], found.weights["b"]]), 1e-5)


@given(st.integers(0, 200), st.floats(1e-3, 1e3), st.integers(1, 3))
def test_scales_and_dead_features(seed, scale, dead):
    X, W, R, fold = tokens(30, 6, 3, seed=seed)
    X[:, :dead] = 0
    S = torch.stack([X[fold == f].T @ X[fold == f] for f in range(2)])
    B = torch.stack([X[fold == f].T @ R[fold == f] for f in range(2)])
    found = shifted_targets({"": W}, S, {"": B})
    assert 0 <= found.factor <= 1
    assert torch.equal(found.weights[""][:, :dead], W[:, :dead].float())
    scaled = shifted_targets({"": W}, S * scale**2, {"": B * scale**2})
    assert scaled.factor == pytest.approx(found.factor, abs=1e-4)
    assert_close("target", found.weights[""], scaled.weights[""], 1e-4)


def test_no_shift_where_nothing_differs_or_nothing_is_held_out():
    X, W, R, fold = tokens(30, 6, 3)
    S = torch.stack([X[fold == f].T @ X[fold == f] for f in range(2)])
    B = torch.stack([X[fold == f].T @ R[fold == f] for f in range(2)])
    for grams, pulls in ((S, B * 0), (S[:1], B[:1]), (S * torch.tensor([1, 0])[:, None, None], B)):
        found = shifted_targets({"": W}, grams, {"": pulls})
        assert found.factor == 0.0
        assert torch.equal(found.weights[""], W.float())


def test_pure_noise_is_hardly_followed():
    generator = torch.Generator().manual_seed(3)
    X, R = torch.randn(200, 50, generator=generator), torch.randn(200, 20, generator=generator)
    S = torch.stack([X[f::2].T @ X[f::2] for f in range(2)])
    B = torch.stack([X[f::2].T @ R[f::2] for f in range(2)])
    assert shifted_targets({"": torch.zeros(20, 50)}, S, {"": B}).factor < 0.1


def test_cross_products_follow_the_folds():
    X, _, R, _ = tokens(50, 4, 3)
    gram = GramFolds(4, segment=7, dtype=torch.float64)
    for a, b in ((0, 20), (20, 33), (33, 50)):
        gram.update(X[a:b], {"r": R[a:b]})
    fold = torch.arange(50) // 7 % 2
    for f in range(2):
        assert_close("cross", X[fold == f].T @ R[fold == f], gram.cross["r"][f], 1e-12)
    halves = [GramFolds(4, segment=7, dtype=torch.float64, first=first) for first in (0, 30)]
    halves[0].update(X[:30])
    halves[1].update(X[30:])
    assert_close("ranks", gram.folds, halves[0].folds + halves[1].folds, 1e-12)


def test_a_feature_that_quantization_has_silenced_does_not_blow_its_weights_up():
    """Over next to nothing, least squares would put what the residual owes that feature."""
    X, W, _, fold = tokens(400, 6, 3)
    wanted = 0.1 * torch.randn(3, 6, dtype=torch.float64)
    R = X @ wanted.T  # what full precision has beyond the layer
    X[:, 2] *= 1e-6
    S = torch.stack([X[fold == f].T @ X[fold == f] for f in range(2)])
    B = torch.stack([X[fold == f].T @ R[fold == f] for f in range(2)])
    assert float(least_squares_shift(S.sum(0), B.sum(0))[:, 2].norm()) > 1e3
    found = shifted_targets({"a": W}, S, {"a": B})
    assert found.factor > 0
    moved = (found.weights["a"] - W).norm(dim=0)
    assert float(moved[2]) <= 1.001 * LONGEST * max(float(W[:, 2].norm()), float(W.norm(dim=0).square().mean().sqrt()))
    assert float(moved.sum() - moved[2]) > 0.01
