import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polytope_lp import Assignment, OraclePolytope, Parity, Slate, VertexList, corral, simplex
from polytope_lp.polytopes.oracle import project_rows
from scipy.optimize import nnls


def _vertices(kind):
    if kind == "parity":
        return np.array([v for v in itertools.product([0.0, 1.0], repeat=4) if sum(v) % 2 == 0])
    if kind == "assignment":
        found = []
        for items in itertools.permutations(range(3), 2):
            vertex = np.zeros((3, 2))
            vertex[list(items), [0, 1]] = 1.0
            found.append(vertex.ravel())
        return np.array(found)
    n, found = 2, []
    for path in itertools.product(range(n), repeat=3):
        vertex = np.zeros(n + 2 * n * n)
        vertex[path[0]] = 1.0
        for place in range(2):
            vertex[n + place * n * n + path[place] * n + path[place + 1]] = 1.0
        found.append(vertex)
    return np.array(found)


KINDS = {"parity": Parity(), "assignment": Assignment(2), "slate": Slate(2, 3)}


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 30.0, 3e4]))
def test_projection_is_nearest_among_all_convex_combinations(kind, seed, scale):
    vertices, polytope = _vertices(kind), KINDS[kind]
    y = np.random.default_rng(seed).normal(size=vertices.shape[1]) * scale
    found = polytope.project_block(y)
    x = found.point if found.complete else project_rows(y, *polytope.rows(y.size))
    assert ((vertices - x) @ (y - x)).max() <= 1e-9 * max(1.0, scale)  # the variational inequality, over every vertex
    outside = nnls(np.vstack([vertices.T, np.full(len(vertices), 1e4)]), np.append(x, 1e4))[1]
    assert outside <= 1e-7


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 10**6))
def test_oracles_name_a_best_vertex(kind, seed):
    vertices = _vertices(kind)
    direction = np.random.default_rng(seed).normal(size=vertices.shape[1])
    best = KINDS[kind].best(direction)
    assert best @ direction == pytest.approx((vertices @ direction).max())
    assert (vertices == best).all(1).any()


def test_oracle_alone_equals_the_closed_form_of_the_simplex():
    offsets = torch.tensor([0, 4, 9])
    oracle = OraclePolytope(lambda d: np.eye(d.size)[int(d.argmax())])
    for seed in range(20):
        y = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 5 - 1)
        closed = simplex(1.0, equality=True).project(y, offsets)
        assert torch.allclose(oracle.project(y, offsets), closed, atol=1e-7)


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
    exact = project_rows(y, *kind.rows(200))
    assert np.abs(x - exact).max() <= 1e-7
    S = corral.project(y, kind.best).vertices
    shifted = S - y
    assert np.linalg.cond(shifted @ shifted.T) > 1e3 * np.linalg.cond((S[1:] - S[0]) @ (S[1:] - S[0]).T)


def test_vertex_list_and_bad_lengths():
    square = VertexList([[0, 0], [1, 0], [0, 1], [1, 1]])
    x = square.project(torch.tensor([0.3, 2.0], dtype=torch.float64), torch.tensor([0, 2]))
    assert torch.allclose(x, torch.tensor([0.3, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="blocks: expected length 2, got 3"):
        square.check(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="vertices: "):
        VertexList([1.0, 2.0])
    with pytest.raises(ValueError, match="at least 2 items"):
        Assignment(2).check(torch.tensor([0, 2]))
