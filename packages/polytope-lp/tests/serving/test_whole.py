"""Exact whole allocations against the LP's own optimum, which is whole where every edge takes one unit."""

import numpy as np
import pytest
import scipy.sparse
from core_tensor.dev.testing import shared_data
from hypothesis import example, given, settings
from hypothesis import strategies as st
from polytope_lp import Marketplace, MatchingProblem, box_cut, generate, simplex, solve
from polytope_lp.matching import exact
from polytope_lp.matching.exact import _rows
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
@example(4587, False)  # budgets of zero, whose edges were taken for a source's best
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


def _integer_optimum(problem):
    """The best whole allocation by HiGHS on all edges; None if there is none."""
    matrix, b, equal = _rows(problem)
    limit = np.floor(problem.limits(0, problem.data.blocks).numpy() + 1e-9)
    rows = LinearConstraint(scipy.sparse.csr_matrix(matrix), np.where(equal, b, -np.inf), b)
    cost = problem.data.cost.double().numpy()
    return milp(cost, integrality=np.ones(cost.size), bounds=Bounds(0, limit), constraints=rows)


@pytest.mark.parametrize("units", [True, False])
def test_minimums_equations_and_filled_sources_are_rounded_within_every_row(units):
    whole = 0
    for seed in range(12):
        random = np.random.default_rng(seed)
        source, destination = np.nonzero(random.random((10, 4)) < 0.8)
        source, destination = np.append(source, np.arange(10)), np.append(destination, np.full(10, 4))
        order = np.lexsort((destination, source))
        source, destination = source[order], destination[order]
        cost = None if units else np.where(destination < 4, random.integers(1, 4, source.size), 1.0)
        sense = np.array([">=", "<=", "=", "<=", "<="])[:5]
        budgets = np.array([2.0, 3.0, 2.0, 2.0, 10.0])
        problem = MatchingProblem.from_arrays(
            np.searchsorted(source, np.arange(11)),
            destination,
            random.random(source.size),
            cost,
            budgets,
            simplex(1.0, equality=seed % 2 == 0),
            equality=sense == "=",
            at_least=sense == ">=",
        )
        truth = _integer_optimum(problem)
        solution = solve(problem, 1e-5)
        if truth.x is None:
            continue
        whole += 1
        for method in ("greedy", "exact"):
            found = solution.rounded(method)
            load = np.asarray(_rows(problem)[0] @ found.x)
            assert (found.x == np.round(found.x)).all()
            assert (load[:5] <= problem.budgets.numpy() + 1e-9).all()
            assert found.load[2] == 2.0
            assert (load[5:] == 1.0).all() if seed % 2 == 0 else (load[5:] <= 1.0).all()
            assert found.value <= -truth.fun + 1e-9
        assert found.proved
        assert found.value == pytest.approx(-truth.fun, abs=1e-9)
    assert whole >= 6


def test_costs_that_are_not_whole_have_a_proved_best_allocation_too():
    problem = generate(Marketplace(sources=60, destinations=6, degree=3.0))
    found = solve(problem, 1e-4).rounded("exact")
    assert found.proved
    assert found.value == pytest.approx(-_integer_optimum(problem).fun, rel=1e-6)
    assert (found.load <= problem.budgets.numpy()).all()


def test_rounding_says_when_there_is_no_whole_allocation():
    problem = MatchingProblem.from_arrays([0, 1], [0], [1.0], None, [0.5], equality=[True])
    with pytest.raises(ValueError, match="no whole allocation"):
        solve(problem, 1e-6).rounded()


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


def test_an_answer_of_highs_outside_its_bounds_is_no_allocation(monkeypatch):
    problem = MatchingProblem.from_arrays(
        [0, 1, 2], [0, 0], [1.0, 1.0], None, [1.0], box_cut(5.0, 1.0), equality=[True]
    )
    solution = solve(problem, 1e-4)
    wrong = OptimizeResult(x=np.array([2.0, -1.0]), mip_dual_bound=-1.0)  # its row holds
    monkeypatch.setattr(exact, "milp", lambda cost, **options: wrong if cost.size == 2 else OptimizeResult(x=None))
    with pytest.raises(ValueError, match="no whole allocation"):
        solution.rounded("exact")
