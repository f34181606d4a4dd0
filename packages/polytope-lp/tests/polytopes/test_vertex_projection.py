"""The corral itself: warm starts, few vertices for small ridges, the switch to the QP, and its numerics."""

import numpy as np
import torch
from polytope_lp import Assignment, Slate
from polytope_lp.polytopes import corral
from polytope_lp.polytopes.rows import project_rows


def test_warm_corrals_save_oracle_calls():
    random, kind = np.random.default_rng(0), Assignment(5)
    y = (random.random((10, 1)) * (1 / np.log2(np.arange(2, 7))) + 0.05 * random.random((10, 5))).ravel() / 1e-2
    cold = corral.project(y, kind.best)
    warm = corral.project(y + 1e-3 * random.normal(size=y.size), kind.best, cold.vertices)
    assert warm.calls < cold.calls
    assert np.allclose(warm.point, corral.project(y, kind.best).point, atol=1e-2)


def test_small_ridges_need_few_vertices_and_large_ones_switch():
    random = np.random.default_rng(1)
    y = (random.random((20, 1)) / np.log2(np.arange(2, 12)) + 0.05 * random.random((20, 10))).ravel()
    sharp, soft = Assignment(10), Assignment(10)
    offsets = torch.tensor([0, 200])
    assert len(sharp.project_block(y / 1e-3).weights) <= 4
    x = soft.project(torch.from_numpy(y / 1e-1), offsets)
    assert soft.switched == 1
    assert sharp.switched == 0
    full = corral.project(y / 1e-1, soft.best).point
    assert np.allclose(x.numpy(), full, atol=1e-7)


def test_differences_keep_accuracy_where_shifted_grams_lose_it():
    random, kind = np.random.default_rng(2), Assignment(10)
    y = (random.random((20, 1)) / np.log2(np.arange(2, 12)) + 0.05 * random.random((20, 10))).ravel() / 1e-3
    x = corral.project(y, kind.best).point
    exact = project_rows(y, kind.rows(200))
    assert np.abs(x - exact).max() <= 1e-7
    S = corral.project(y, kind.best).vertices
    shifted = S - y
    assert np.linalg.cond(shifted @ shifted.T) > 1e3 * np.linalg.cond((S[1:] - S[0]) @ (S[1:] - S[0]).T)


def test_slates_switch_to_their_flow_rows():
    kind, random = Slate(4, 4), np.random.default_rng(3)
    y = 0.1 * random.normal(size=4 + 3 * 16)
    x = kind.project(torch.from_numpy(y), torch.tensor([0, y.size])).numpy()
    assert kind.switched == 1
    assert np.allclose(x, corral.project(y, kind.best).point, atol=1e-7)
