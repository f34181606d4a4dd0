import numpy as np
import pytest
import torch
from core_tensor.dev.testing import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from polytope_lp import Marketplace, MatchingProblem, box, box_cut, generate, knapsack, simplex, solve

FAMILIES = {
    "box": lambda random, lengths: box(float(random.random() + 0.2)),
    "simplex": lambda random, lengths: simplex(torch.from_numpy(random.random(lengths.size) + 0.1)),
    "box_cut": lambda random, lengths: box_cut(float(random.random() + 0.5), 0.6),
    "knapsack": lambda random, lengths: knapsack(1.0, torch.from_numpy(random.random(lengths.sum()) + 0.2), 0.7),
}


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 10**6), st.sampled_from([1, 2]))
def test_certificate_brackets_the_optimum_of_highs(random_problem, oracle, kind, seed, rows_per_edge):
    problem = random_problem(seed, FAMILIES[kind], rows_per_edge=rows_per_edge)
    truth = oracle(problem).fun
    solution = solve(problem, 1e-7)
    assert solution.status == "optimal"
    assert solution.lower_bound <= truth + 1e-9
    assert solution.upper_bound >= truth - 1e-9
    assert solution.gap <= 1e-7
    assert solution.verify()["ok"], solution.verify()["problems"]


@pytest.mark.parametrize("kind", ["uncorrelated", "tied", "counts", "pacing"])
def test_generated_marketplaces_solve_and_verify(kind):
    problem = generate(Marketplace(sources=2000, destinations=50, kind=kind))
    solution = solve(problem, 1e-4)
    assert solution.status == "optimal"
    report = solution.verify()
    assert report["ok"], report["problems"]
    assert bool((solution.load <= problem.budgets).all())


def test_tied_optimum_is_known(oracle):
    problem = generate(Marketplace(sources=300, destinations=10, kind="tied", degree=4.0, seed=3))
    solution = solve(problem, 1e-6)
    assert solution.objective == pytest.approx(oracle(problem).fun, rel=1e-6)


@pytest.mark.parametrize(("K", "share", "optimum"), [(1, None, 3502.0), (5, 0.1, 17244.5)])
def test_movielens_matching_meets_the_published_optimum(K, share, optimum):
    import csv

    with shared_data("movielens_latest_small", "ratings.csv").open() as file:
        rows = [(int(r["userId"]), int(r["movieId"]), float(r["rating"])) for r in csv.DictReader(file)]
    rows.sort()
    user, movie, rating = (np.array(column) for column in zip(*rows, strict=True))
    _, source = np.unique(user, return_inverse=True)
    _, destination, counts = np.unique(movie, return_inverse=True, return_counts=True)
    budgets = np.ones(counts.size) if share is None else np.maximum(1.0, np.floor(share * counts))
    offsets = np.searchsorted(source, np.arange(source.max() + 2))
    problem = MatchingProblem.from_arrays(offsets, destination, rating, None, budgets, box_cut(float(K), 1.0))
    solution = solve(problem, 1e-5)
    assert solution.status == "optimal"
    assert solution.lower_bound <= -optimum <= solution.upper_bound
    assert solution.objective == pytest.approx(-optimum, rel=1e-5)
    assert solution.verify()["ok"]
    whole = solution.rounded()  # budgets of whole numbers are used up to the last unit
    assert 0.97 * optimum <= whole.value <= optimum
    assert (whole.load <= budgets).all()


def test_verify_finds_a_lie():
    import dataclasses

    problem = generate(Marketplace(sources=200, destinations=10, degree=4.0))
    solution = solve(problem, 1e-3)
    better = dataclasses.replace(solution, lower_bound=solution.lower_bound * 0.999)
    assert not better.verify()["ok"]
    unrepaired = dataclasses.replace(solution, shrink=None)
    assert not unrepaired.verify()["ok"]
    negative = dataclasses.replace(solution, lam=solution.lam - 1.0)
    assert not negative.verify()["ok"]


def test_infeasible_equations_end_with_a_certificate():
    problem = MatchingProblem.from_arrays(
        [0, 2, 4], [0, 1, 0, 1], [1.0, 1.0, 1.0, 1.0], None, [1.5, 1.0], simplex(1.0), equality=[True, True]
    )
    assert solve(problem, 1e-4, evaluations=500).status == "infeasible"


def test_empty_sources_are_skipped_and_counted():
    problem = MatchingProblem.from_arrays(
        [0, 1, 1, 2], [0, 0], [1.0, 2.0], None, [1.0], simplex(torch.tensor([1.0, 5.0, 1.0], dtype=torch.float64))
    )
    assert problem.skipped == 1
    assert problem.data.blocks == 2
    assert solve(problem).objective == pytest.approx(-2.0, rel=1e-4)


GOOD = {
    "offsets": [0, 2, 3],
    "index": [0, 1, 0],
    "value": [1.0, 2.0, 3.0],
    "cost": [1.0, 1.0, 1.0],
    "budgets": [1.0, 1.0],
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"value": [1.0, float("nan"), 3.0]}, ValueError, "cost: .*NaN"),
        ({"cost": [1.0, float("inf"), 1.0]}, ValueError, "coefficient: .*infinite"),
        ({"budgets": [1.0, float("nan")]}, ValueError, "budgets: .*nan"),
        ({"index": [0, 2, 0]}, ValueError, r"index: .*\[0, 2\)"),
        ({"index": [0, -1, 0]}, ValueError, "index: "),
        ({"index": [0, 2**40, 0]}, ValueError, "index: "),
        ({"index": [0.0, 1.0, 0.0]}, TypeError, "index: .*integers"),
        ({"index": [1, 1, 0]}, ValueError, "edge from source 0 to destination 1 appears twice"),
        ({"budgets": [1.0, 1.0, 1.0]}, ValueError, "budgets: 1 without any edge, such as 2"),
        ({"offsets": [0, 2, 4]}, ValueError, "offsets: "),
        ({"polytope": simplex(-1.0)}, ValueError, "cap: .*at least 0"),
        ({"polytope": box(float("inf"))}, ValueError, "upper|cap"),
    ],
)
def test_bad_problems_name_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        MatchingProblem.from_arrays(**(GOOD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tol": 1e-14}, "tol: float64"),
        ({"tol": 0.0}, "tol: "),
        ({"method": "magic"}, "method: "),
        ({"gamma": -1.0}, "gamma: "),
    ],
)
def test_bad_options_name_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        solve(MatchingProblem.from_arrays(**GOOD), **({"tol": 1e-4} | change))
