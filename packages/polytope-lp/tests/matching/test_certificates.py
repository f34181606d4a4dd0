"""Certificates at the edges of real data: free edges, "no limit" numbers, tiny values, and certificates that lie."""

import dataclasses

import numpy as np
import pytest
import torch
from polytope_lp import Marketplace, MatchingProblem, box, generate, simplex, solve
from polytope_lp.matching.verify import check_claims


def _complete(seed, sources=6, destinations=3):
    random = np.random.default_rng(seed)
    n = sources * destinations
    cost, value = random.integers(0, 3, n), random.integers(1, 4, n)
    budgets = np.round(random.random(destinations) * 2 + 0.2, 1)
    offsets, index = np.arange(sources + 1) * destinations, np.tile(np.arange(destinations), sources)
    return MatchingProblem.from_arrays(offsets, index, value, cost, budgets)


@pytest.mark.parametrize("seed", range(30))
def test_free_edges_keep_their_amounts_in_bound_and_primal(seed, oracle, wide_markets):
    problem = _complete(seed)
    solution = solve(problem, 1e-6)
    assert solution.status == "optimal"
    assert solution.verify()["ok"], solution.verify()["problems"]
    assert solution.objective == pytest.approx(oracle(problem).fun, rel=1e-6)
    assert not wide_markets.false_claims(problem, solution)


def test_a_few_free_edges_in_a_market_verify():
    market = generate(Marketplace(sources=1000, destinations=30))
    d, free = market.data, torch.rand(market.data.variables, generator=torch.Generator().manual_seed(0)) < 0.05
    problem = dataclasses.replace(market, data=dataclasses.replace(d, coefficient=d.coefficient.masked_fill(free, 0.0)))
    solution = solve(problem, 1e-4)
    assert solution.status == "optimal"
    assert solution.verify()["ok"], solution.verify()["problems"]


@pytest.fixture(scope="module")
def market():
    return generate(Marketplace(sources=600, destinations=20))


def _with(market, polytope=None, factor=1.0, cost_factor=1.0, value=None):
    d = market.data
    value = -d.cost.double() * factor if value is None else value
    a, b = d.coefficient.double() * cost_factor, market.budgets * cost_factor
    return MatchingProblem.from_arrays(d.offsets, d.index, value, a, b, polytope, allow_unused=True)


@pytest.mark.parametrize("limit", [1e6, 1e9, 1e12, 1e15, 1e18])
@pytest.mark.parametrize("kind", [box, simplex])
def test_no_limit_numbers_are_no_limits(market, kind, limit):
    solution, plain = solve(_with(market, kind(limit)), 1e-5), solve(_with(market, box(1e4)), 1e-5)
    assert solution.status == "optimal"
    assert 0 <= solution.gap <= 1e-5
    assert solution.verify()["ok"], solution.verify()["problems"]
    assert solution.objective == pytest.approx(plain.objective, rel=2e-5)


@pytest.mark.parametrize("big", [1e12, 1e15, 1e18])
def test_big_m_edges_are_never_used_and_cost_no_digits(market, big):
    value = -market.data.cost.double()
    value[::7] = -big
    solution = solve(_with(market, value=value), 1e-5)
    assert solution.status == "optimal"
    assert solution.verify()["ok"], solution.verify()["problems"]
    assert float(solution.x()[::7].max()) == 0.0


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e-3, 1e6, 1e12])
def test_units_of_value_and_cost_do_not_matter(market, factor):
    base, other = solve(market, 1e-5), solve(_with(market, factor=factor), 1e-5)
    assert other.status == "optimal"
    assert other.objective == pytest.approx(factor * base.objective, rel=2e-5)
    priced = solve(_with(market, cost_factor=factor), 1e-5)
    assert priced.status == "optimal"
    assert priced.objective == pytest.approx(base.objective, rel=2e-5)


@pytest.mark.parametrize("seed", range(40))
def test_wide_markets_make_no_false_claim(wide_markets, seed):
    problem = wide_markets.wide_market(seed)
    solution = solve(problem, 1e-6)
    assert not wide_markets.false_claims(problem, solution)
    assert solution.verify()["ok"], solution.verify()["problems"]
    assert solution.status != "optimal" or solution.gap >= -1e-9


@pytest.mark.parametrize("seed", [7000399, 7001014, 7001219, 7001278, 9100074])
def test_coefficients_that_highs_would_drop_count(wide_markets, seed):
    problem = wide_markets.wide_market(seed)  # coefficients down to 1e-10, budgets of their size
    solution = solve(problem, 1e-6)
    assert solution.status == "optimal"
    assert solution.verify()["ok"], solution.verify()["problems"]
    assert not wide_markets.false_claims(problem, solution)


@pytest.mark.parametrize("seed", [*range(20), 96, 505])
def test_wide_markets_with_equations_verify(wide_markets, seed):
    solution = solve(wide_markets.wide_market(seed, equations=True), 1e-6)
    assert solution.verify()["ok"], solution.verify()["problems"]


def test_a_market_without_value_is_solved():
    problem = MatchingProblem.from_arrays([0, 2], [0, 1], [0.0, 0.0], None, [1.0, 1.0])
    solution = solve(problem)
    assert solution.status == "optimal"
    assert solution.objective == solution.lower_bound == 0.0
    assert solution.verify()["ok"]


def test_values_beyond_float64_are_refused():
    problem = MatchingProblem.from_arrays([0, 1], [0], np.array([1e300]), np.array([1e-300]), [1e300], simplex(1e300))
    with pytest.raises(ValueError, match="range of float64"):
        solve(problem)


@pytest.fixture(scope="module")
def stopped(market):
    return solve(market, 1e-6, evaluations=8)


LIES = [
    ({"status": "optimal"}, "optimal: the gap"),
    ({"status": "foo"}, "status: expected one of"),
    ({"status": "infeasible"}, "infeasible: the lower bound"),
    ({"status": "optimal_residual"}, "optimal_residual: "),
    ({"status": "optimal", "upper_bound": None, "gap": None}, "expected an upper bound"),
    ({"gap": None}, "both or neither"),
    ({"gap": 0.0}, "gap: "),
    ({"objective": None}, "objective: expected a finite number"),
    ({"objective": 0.0}, "objective: "),
    ({"lower_bound": 0.0}, "the lower bound is"),
    ({"max_violation": float("nan")}, "max_violation: expected a finite number"),
    ({"max_violation": 0.5}, "max_violation: 0.5 is claimed"),
    ({"tol": 0.0}, "tol: "),
    ({"unit": 1.0}, "unit: "),
    ({"gamma": -1.0}, "gamma: "),
    ({"seconds": -1.0}, "seconds: "),
    ({"seconds": "3"}, "seconds: expected a finite number"),
    ({"evaluations": 0}, "evaluations: "),
    ({"evaluations": 2.5}, "evaluations: expected a whole number"),
    ({"edges": 7}, "edges: "),
    ({"sources": 7}, "sources: "),
    ({"skipped_sources": 7}, "skipped_sources: "),
    ({"destinations": 7}, "destinations: "),
    ({"proximal": "yes"}, "proximal: "),
    ({"engine": "magic"}, "engine: expected one of"),
    ({"proved_by": "hand"}, "proved_by: no field"),
]


@pytest.mark.parametrize(("change", "message"), LIES)
def test_every_field_of_a_certificate_is_checked(stopped, change, message):
    claims = stopped.certificate()
    x, lam = stopped.x().numpy(), stopped.lam.numpy()
    assert check_claims(stopped.problem, x, lam, claims)["ok"]
    found = check_claims(stopped.problem, x, lam, claims | change)
    assert not found["ok"]
    assert any(message in line for line in found["problems"]), found["problems"]


def test_a_missing_field_and_a_lowered_upper_bound_are_lies(stopped):
    claims, x, lam = stopped.certificate(), stopped.x().numpy(), stopped.lam.numpy()
    for name in claims:
        rest = {key: value for key, value in claims.items() if key != name}
        assert f"{name}: missing" in check_claims(stopped.problem, x, lam, rest)["problems"]
    lower = claims | {"upper_bound": claims["upper_bound"] - 10.0}
    assert any(line.startswith("upper_bound") for line in check_claims(stopped.problem, x, lam, lower)["problems"])


def test_an_objective_below_the_lower_bound_is_named(market):
    solution = solve(market, 1e-5)
    twice = 2.0 * solution.x().numpy()
    found = check_claims(market, twice, solution.lam.numpy(), solution.certificate())
    assert any("is below the lower bound" in line for line in found["problems"])
    assert any("leaves its polytope" in line for line in found["problems"])
