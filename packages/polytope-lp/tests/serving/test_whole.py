"""Exact whole allocations against the LP's own optimum, which is whole where every edge takes one unit."""

import numpy as np
import pytest
from core_tensor.dev.testing import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from polytope_lp import Marketplace, MatchingProblem, box_cut, generate, solve


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_whole_allocations_are_optimal_and_proved(oracle, seed, whole_values):
    random = np.random.default_rng(seed)
    source, destination = np.nonzero(random.random((12, 5)) < 0.6)
    value = random.integers(1, 6, source.size).astype(float) if whole_values else random.random(source.size)
    offsets = np.searchsorted(source, np.arange(13))
    budgets, cap = random.integers(0, 4, 5), float(random.integers(1, 4))
    problem = MatchingProblem.from_arrays(
        offsets, destination, value, None, budgets, box_cut(cap, 1.0), allow_unused=True
    )
    solution = solve(problem, 1e-3)
    best = solution.rounded("exact")
    assert best.proved
    assert best.value == pytest.approx(-oracle(problem).fun, abs=1e-6)
    assert (best.x == np.round(best.x)).all()
    assert (best.load <= budgets).all()
    assert best.value >= solution.rounded().value - 1e-9
    assert best.bound >= best.value - 1e-6


def test_budgets_that_are_not_whole_are_rounded_down(oracle):
    problem = MatchingProblem.from_arrays([0, 1, 2], [0, 0], [1.0, 2.0], None, [1.7])
    assert solve(problem, 1e-4).rounded("exact").value == 2.0


def test_other_problems_are_refused():
    with pytest.raises(ValueError, match="costs and weights of one"):
        solve(generate(Marketplace(sources=50, destinations=5, degree=2.0)), 1e-3).rounded("exact")


def test_movielens_is_matched_to_the_last_rating():
    rows = np.genfromtxt(
        shared_data("movielens_latest_small", "ratings.csv"), delimiter=",", names=True, usecols=(0, 1, 2)
    )
    order = np.lexsort((rows["movieId"], rows["userId"]))
    _, source = np.unique(rows["userId"][order], return_inverse=True)
    _, destination = np.unique(rows["movieId"][order], return_inverse=True)
    offsets, budgets = np.searchsorted(source, np.arange(source.max() + 2)), np.ones(destination.max() + 1)
    problem = MatchingProblem.from_arrays(offsets, destination, rows["rating"][order], None, budgets, box_cut(1.0, 1.0))
    best = solve(problem, 1e-4).rounded("exact")
    assert best.value == 3502.0
    assert best.proved
