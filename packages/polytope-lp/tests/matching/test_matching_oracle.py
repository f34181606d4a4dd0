"""Matching problems of every family against HiGHS: equations, negative costs, ties and infeasible budgets included."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from polytope_lp import BlockLP, MatchingProblem, box, box_cut, knapsack, simplex, solve

FAMILIES = {
    "box": lambda random, lengths: box(float(random.random() + 0.2)),
    "simplex": lambda random, lengths: simplex(torch.from_numpy(random.random(lengths.size) + 0.1)),
    "simplex_eq": lambda random, lengths: simplex(1.0, equality=True),
    "box_cut": lambda random, lengths: box_cut(float(random.random() + 0.5), 0.6),
    "box_cut_eq": lambda random, lengths: box_cut(
        torch.from_numpy(0.6 * lengths * random.uniform(0.2, 1, lengths.size)), 0.6, equality=True
    ),
    "knapsack": lambda random, lengths: knapsack(1.0, torch.from_numpy(random.random(lengths.sum()) + 0.2), 0.7),
    "knapsack_eq": lambda random, lengths: knapsack(
        0.1, torch.from_numpy(random.random(lengths.sum()) + 0.2), 0.7, equality=True
    ),
}


def _problem(kind, seed, whole, negative, equations, short):
    random, rows, sources = np.random.default_rng(seed), 5, 8
    lengths = random.integers(1, rows + 1, sources)
    used, index = np.unique(
        np.concatenate([np.sort(random.permutation(rows)[:n]) for n in lengths]), return_inverse=True
    )
    n, m = index.size, used.size
    value = random.integers(0, 4, n).astype(float) if whole else random.random(n)
    cost = (random.integers(1, 3, n).astype(float) if whole else random.random(n) + 0.05) - 0.6 * negative
    kind, offsets = FAMILIES[kind](random, lengths), np.concatenate([[0], np.cumsum(lengths)])
    inner = kind.project(torch.from_numpy(random.normal(size=n)), torch.from_numpy(offsets)).numpy()
    equal = random.random(m) < 0.5 * equations
    budgets = np.bincount(index, cost * inner, m) + np.where(equal, 0.0, 0.3 * random.random(m)) - 0.4 * short
    return MatchingProblem.from_arrays(offsets, index, value, cost, budgets, kind, equality=equal)


def _compare(oracle, problem):
    truth, solution = oracle(problem), solve(problem, 1e-6, evaluations=5000)
    if truth.status == 0:
        assert solution.status in {"optimal", "optimal_residual"}
        assert solution.objective == pytest.approx(truth.fun, rel=5e-6, abs=5e-6)
        assert solution.lower_bound <= truth.fun + 1e-9 * max(1.0, abs(truth.fun))
        assert solution.upper_bound >= truth.fun - 1e-9 * max(1.0, abs(truth.fun))
        assert solution.verify()["ok"], solution.verify()["problems"]
    else:
        assert solution.status == "infeasible"  # a certificate, and not a loop until some limit
        assert solution.verify()["ok"], solution.verify()["problems"]
        lie = dataclasses.replace(solution, lam=torch.zeros_like(solution.lam), lower_bound=-1e9)
        assert not lie.verify()["ok"]


CASES = (st.sampled_from(sorted(FAMILIES)), st.integers(0, 10**6), *[st.booleans()] * 4)


@settings(max_examples=50, deadline=None)
@given(*CASES)
@example("knapsack_eq", 230251, True, False, True, False)  # an equation of 4e-17, whose price rose to 1e18
def test_every_family_agrees_with_highs(oracle, kind, seed, whole, negative, equations, short):
    _compare(oracle, _problem(kind, seed, whole, negative, equations, short))


@settings(max_examples=12, deadline=None)
@given(*CASES)
def test_first_and_second_order_roads_meet(kind, seed, whole, negative, equations, short):
    problem = _problem(kind, seed, whole, negative, equations, short)
    dual, exact = solve(problem, 1e-6, evaluations=5000), solve(BlockLP.from_matching(problem), 1e-7)
    assert (dual.status == "infeasible") == (exact.status == "infeasible")
    if exact.status != "infeasible":
        assert dual.objective == pytest.approx(exact.objective, rel=5e-6, abs=5e-6)
