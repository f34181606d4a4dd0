"""Which engine solves a general LP, what it says where there is no optimum, and that `verify` checks all of it."""

import dataclasses

import numpy as np
import pytest
import torch
from core_tensor.dev.testing import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from polytope_lp import BlockLP, MatchingProblem, box, linprog_blocks, simplex, solve
from scipy.optimize import linprog


def test_boxes_go_to_highs_and_polytopes_to_newton_steps():
    A, c = np.ones((1, 4)), -np.arange(1.0, 5.0)
    boxes = solve(BlockLP.build(c, A, [2.0], blocks=[(box(1.0), [1] * 4)]), 1e-7)
    simplices = solve(BlockLP.build(c, A, [2.0], blocks=[(simplex(1.0), [2, 2])]), 1e-7)
    assert boxes.engine == boxes.certificate()["engine"] == "highs"
    assert simplices.engine == "newton"
    assert boxes.objective == pytest.approx(-7.0)
    assert simplices.objective == pytest.approx(-6.0)
    assert boxes.verify()["ok"]
    assert simplices.verify()["ok"]
    newton = solve(BlockLP.build(c, A, [2.0], blocks=[(box(1.0), [1] * 4)]), 1e-7, engine="newton")
    assert newton.engine == "newton"
    assert newton.objective == pytest.approx(-7.0, rel=1e-6)


def test_an_engine_that_does_not_fit_is_refused():
    lp = BlockLP.build([-1.0, -1.0], np.ones((1, 2)), [1.0], blocks=[(simplex(1.0), [2])])
    with pytest.raises(ValueError, match="engine: expected newton"):
        solve(lp, engine="highs")
    with pytest.raises(ValueError, match="engine: expected one of"):
        solve(lp, engine="magic")
    with pytest.raises(TypeError, match="engine: expected auto"):
        solve(MatchingProblem.from_arrays([0, 1], [0], [1.0], None, [1.0]), engine="highs")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(["bounded", "half open", "free"]))
def test_every_end_of_an_lp_is_highs_own_and_is_proved(seed, equations, kind):
    random = np.random.default_rng(seed)
    n, m = int(random.integers(1, 7)), int(random.integers(1, 5))
    A, c, b = (random.integers(-3, 4, size).astype(float) for size in ((m, n), n, m))
    side = {"A_eq": A, "b_eq": b} if equations else {"A_ub": A, "b_ub": b}
    bounds = {"bounded": (0, 2), "half open": (0, None), "free": (None, None)}[kind]
    truth = linprog(c, **side, bounds=bounds, method="highs", options={"presolve": False})
    ours = linprog_blocks(c, **side, bounds=[bounds] * n)
    assert {0: 0, 2: 2, 3: 3, 4: ours.status}[truth.status] == ours.status, (truth.message, ours.message)
    if truth.status == 0:
        assert ours.fun == pytest.approx(truth.fun, abs=1e-7)
    found = solve(BlockLP.build(c, **side, bounds=[bounds] * n), 1e-7)
    assert found.verify()["ok"], found.verify()["problems"]


def test_an_unbounded_lp_comes_with_its_ray():
    found = solve(BlockLP.build([-1.0, 1.0], [[1.0, -2.0]], [3.0], bounds=[(0, None), (0, None)]), 1e-7)
    assert found.status == "unbounded"
    assert found.ray is not None
    assert -found.ray[0] + found.ray[1] < 0
    assert found.verify()["ok"]
    for ray in (None, -found.ray, 0.0 * found.ray):
        assert not dataclasses.replace(found, ray=ray).verify()["ok"]


@pytest.mark.parametrize("change", [{"gap": 1.0}, {"objective": 0.0}, {"status": "foo"}, {"lower_bound": 10.0}])
def test_claims_about_a_general_lp_are_checked(change):
    lp = BlockLP.build([-1.0, -2.0], [[1.0, 1.0]], [1.5], blocks=[(box(1.0), [1, 1])])
    found = solve(lp, 1e-7)
    x = found.x * (0.5 if change == {"gap": 1.0} else 1.0)
    assert not dataclasses.replace(found, x=x, **change).verify()["ok"]


def test_no_rows_and_no_costs_are_lps_too():
    for engine in ("newton", "highs"):
        found = linprog_blocks([-1.0, 2.0], blocks=[(box(1.0), [1, 1])], engine=engine)
        assert found.success, found.message
        assert found.x == pytest.approx([1.0, 0.0], abs=1e-6)
        idle = linprog_blocks([0.0, 0.0], [[1.0, 1.0]], [1.0], blocks=[(box(1.0), [1, 1])], engine=engine)
        assert idle.success, idle.message
    alone = linprog_blocks([-1.0, -2.0], blocks=[(simplex(1.0), [2])])
    assert alone.fun == pytest.approx(-2.0, abs=1e-6)
    with pytest.raises(ValueError, match="at least one variable"):
        linprog_blocks([])


def test_duplicate_rows_are_no_reason_to_stop():
    A = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    for engine in ("newton", "highs"):
        found = linprog_blocks([-1.0, -1.0], A, [1.0, 1.0, 0.0], blocks=[(box(1.0), [1, 1])], engine=engine)
        assert found.success, found.message
        assert found.fun == pytest.approx(-1.0, abs=1e-6)


def test_singular_curvature_of_a_market_is_damped():
    index = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)  # two rows that are the same
    problem = MatchingProblem.from_arrays([0, 1, 2], index, [1.0, 2.0], None, [1.0, 1.0], simplex(1.0))
    solution = solve(problem, 1e-7, method="newton")
    assert solution.status == "optimal"
    assert solution.objective == pytest.approx(-2.0, rel=1e-6)


@pytest.mark.slow
def test_all_shared_netlib_problems_are_solved_and_verified(read_netlib):
    folder = shared_data("netlib_lp", "AFIRO.npz").parent
    for file in sorted(folder.glob("*.npz")):
        given_lp, optimum = read_netlib(file)
        found = solve(BlockLP.build(**given_lp), 1e-7)
        assert found.status in {"optimal", "optimal_residual"}, file.name
        assert found.objective == pytest.approx(optimum, rel=1e-6), file.name
        assert found.verify()["ok"], (file.name, found.verify()["problems"])


@pytest.mark.parametrize("engine", ["highs", "newton"])
@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_gaps_are_relative_whatever_the_unit_of_costs(engine, unit):
    random = np.random.default_rng(4)
    c, A, b = -random.random(30), random.random((6, 30)), np.full(6, 3.0)
    one, other = (solve(BlockLP.build(c * s, A, b, bounds=[(0, 1)] * 30), 1e-7, engine=engine) for s in (1.0, unit))
    assert other.status == one.status == "optimal"
    assert other.objective / unit == pytest.approx(one.objective, rel=2e-7)
    assert other.gap <= 1e-7
    assert other.verify()["ok"], other.verify()["problems"]
    far = BlockLP.build(c * unit, A, b, bounds=[(0, 1)] * 30)
    assert far.lower_bound(np.zeros(6)) < 1.01 * other.lower_bound  # a bound that is off shows in the gap


def test_coefficients_below_1e_9_count():
    # scipy's HiGHS drops them and answers -6
    result = linprog_blocks([-1.0, -2.0], [[1e-10, 2e-10]], [3e-10], bounds=[(0, 2), (0, 2)])
    assert result.success
    assert result.fun == pytest.approx(-3.0, rel=1e-9)
    assert result.lower_bound == pytest.approx(-3.0, rel=1e-9)
