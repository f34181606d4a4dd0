import dataclasses

import numpy as np
import pytest
import scipy.sparse
from core_tensor.dev.testing import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from polytope_lp import Assignment, BlockLP, OraclePolytope, box, box_cut, linprog_blocks, simplex, solve
from scipy.optimize import linprog

EASY = ["AFIRO", "ADLITTLE", "BLEND", "KB2", "SC50A", "SC105", "ISRAEL", "RECIPE", "SHARE1B", "STOCFOR1", "VTP-BASE"]


@pytest.mark.parametrize("name", EASY)
def test_netlib_reaches_the_published_optimum(read_netlib, name):
    given_lp, optimum = read_netlib(shared_data("netlib_lp", f"{name}.npz"))
    result = linprog_blocks(**given_lp)
    assert result.success, result.message
    assert result.fun == pytest.approx(optimum, rel=1e-6)
    assert result.violation <= 1e-7


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_random_lps_agree_with_highs_degenerate_and_infeasible_included(seed, whole, equations):
    random = np.random.default_rng(seed)
    n, m = int(random.integers(2, 9)), int(random.integers(1, 5))
    draw = (
        (lambda *size: random.integers(-3, 4, size).astype(float))
        if whole
        else (lambda *size: random.normal(size=size))
    )
    A, c, b = draw(m, n), draw(n), draw(m)
    side = {"A_eq": A, "b_eq": b} if equations else {"A_ub": A, "b_ub": b}
    truth = linprog(c, **side, bounds=(0, 1), method="highs")
    lengths = [n // 2, n - n // 2]
    ours = linprog_blocks(c, **side, blocks=[(box(1.0), lengths)])
    if truth.status == 0:
        assert ours.success, ours.message
        assert ours.fun == pytest.approx(truth.fun, abs=1e-6)
        assert ours.lower_bound <= truth.fun + 1e-7
    else:
        assert truth.status == 2
        assert ours.status == 2, ours.message  # and not a loop until some limit


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["simplex", "simplex_eq", "box_cut"]), st.integers(0, 10**6))
def test_blocks_of_capped_boxes_agree_with_highs(kind, seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 5, 4)
    n, m = int(lengths.sum()), 3
    A, c = random.normal(size=(m, n)), random.normal(size=n)
    family = {"simplex": simplex(1.0), "simplex_eq": simplex(1.0, equality=True), "box_cut": box_cut(0.8, 0.5)}[kind]
    if kind == "simplex_eq":
        b = A @ np.concatenate([np.full(k, 1 / k) for k in lengths]) + 0.1
    else:
        b = random.random(m) - 0.05
    B = scipy.sparse.block_diag([np.ones((1, k)) for k in lengths]).toarray()
    upper = 0.5 if kind == "box_cut" else None
    cap = np.full(4, 0.8 if kind == "box_cut" else 1.0)
    more = {"A_eq": B, "b_eq": cap, "A_ub": A, "b_ub": b}
    if kind != "simplex_eq":
        more = {"A_ub": np.vstack([A, B]), "b_ub": np.concatenate([b, cap])}
    truth = linprog(c, **more, bounds=(0, upper), method="highs")
    ours = linprog_blocks(c, A, b, blocks=[(family, lengths)])
    if truth.status == 0:
        assert ours.fun == pytest.approx(truth.fun, abs=1e-6)
        assert ours.lower_bound <= truth.fun + 1e-7
    else:
        assert ours.status == 2, ours.message


def test_infeasible_lp_is_proved():
    result = linprog_blocks([1.0, 1.0], A_eq=[[1.0, 1.0]], b_eq=[3.0], blocks=[(box(1.0), [2])])
    assert result.status == 2
    assert not result.success


def test_slots_with_budgets_agree_with_highs():
    random = np.random.default_rng(4)
    items, slots, users = 4, 2, 6
    size = items * slots
    c, A = -random.random(users * size), np.zeros((items, users * size))
    for user in range(users):
        for item in range(items):
            A[item, user * size + item * slots : user * size + (item + 1) * slots] = 1.0
    b = np.full(items, 2.5)
    kind = Assignment(slots, filled=False)
    ours = linprog_blocks(c, A, b, blocks=[(kind, [size] * users)], tol=1e-5)
    rows = kind.rows(size)
    every = scipy.sparse.block_diag([rows.G] * users)
    truth = linprog(c, scipy.sparse.vstack([A, every]), np.concatenate([b, np.tile(rows.h, users)]), method="highs")
    assert ours.success, ours.message
    assert ours.fun == pytest.approx(truth.fun, rel=2e-5)
    assert ours.lower_bound <= truth.fun + 1e-9 <= ours.fun + 2e-9


def test_an_oracle_alone_equals_the_closed_form():
    random = np.random.default_rng(5)
    lengths = [3, 4, 3]
    c, A = -random.random(10), random.random((2, 10))

    def best(direction):
        vertex = np.zeros(direction.size)
        if direction.max() > 0:
            vertex[direction.argmax()] = 1.0
        return vertex

    exact = linprog_blocks(c, A, [0.5, 0.7], blocks=[(simplex(1.0), lengths)])
    ours = linprog_blocks(c, A, [0.5, 0.7], blocks=[(OraclePolytope(best), lengths)], tol=1e-6)
    assert ours.success, ours.message
    assert ours.fun == pytest.approx(exact.fun, rel=1e-5)


def test_results_have_scipys_shape():
    c, A_ub, b_ub = [-1.0, -2.0, 0.5], [[1.0, 1.0, 0.0]], [1.5]
    A_eq, b_eq = [[0.0, 1.0, 1.0]], [0.75]
    truth = linprog(c, A_ub, b_ub, A_eq, b_eq, bounds=(0, 1), method="highs")
    ours = linprog_blocks(c, A_ub, b_ub, A_eq, b_eq, blocks=[(box(1.0), [3])])
    assert ours.x == pytest.approx(truth.x, abs=1e-6)
    assert ours.slack == pytest.approx(truth.slack, abs=1e-6)
    assert ours.con == pytest.approx(truth.con, abs=1e-6)
    assert ours.ineqlin.marginals == pytest.approx(truth.ineqlin.marginals, abs=1e-6)
    assert ours.eqlin.marginals == pytest.approx(truth.eqlin.marginals, abs=1e-6)


def test_solve_takes_a_block_lp_and_verifies_it():
    random = np.random.default_rng(2)
    A, c = random.random((3, 12)), -random.random(12)
    lp = BlockLP.build(c, A, [0.8, 0.9, 1.0], blocks=[(simplex(1.0), [4, 4]), (Assignment(2, filled=False), [4])])
    solution = solve(lp, 1e-6)
    assert solution.status == "optimal"  # A and b at least 0, down-closed blocks: repaired and certified
    assert solution.gap <= 1e-6
    assert solution.max_violation <= 1e-12
    report = solution.verify()
    assert report["ok"], report["problems"]
    table = solution.primal().read_all().to_pydict()
    assert np.allclose(solution.x[table["variable"]], table["x"])
    assert solution.certificate()["status"] == "optimal"
    lies = [{"lower_bound": solution.lower_bound + 1e-3}, {"x": solution.x * 1.1}, {"x": -solution.x}]
    lies += [{"max_violation": 0.5}, {"gap": solution.gap + 1e-6}, {"dual_residual": 1e-3}, {"tol": solution.gap / 2}]
    for lie in lies:
        assert not dataclasses.replace(solution, **lie).verify()["ok"]


def test_infeasibility_comes_with_a_ray_that_verify_checks():
    A = np.ones((1, 4))
    lp = BlockLP.build(np.ones(4), A_eq=A, b_eq=[2.5], blocks=[(simplex(1.0), [2, 2])])
    solution = solve(lp)
    assert solution.status == "infeasible"
    assert solution.verify()["ok"]
    assert not dataclasses.replace(solution, ray=-solution.ray).verify()["ok"]


def test_a_time_limit_is_kept_and_options_of_matching_are_refused():
    lp = BlockLP.build(np.ones(4), np.ones((1, 4)), [1.0], blocks=[(simplex(1.0), [2, 2])])
    assert solve(lp, 1e-9, 1e-9).status in {"time_limit", "optimal"}
    with pytest.raises(TypeError, match="warm_start"):
        solve(lp, warm_start=np.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": [1.0, np.nan]}, "c: .*finite"),
        ({"A_ub": [[1.0]], "b_ub": [1.0]}, r"A_ub: expected shape \(1, 2\)"),
        ({"A_ub": [[1.0, np.inf]], "b_ub": [1.0]}, "A_ub, b_ub: .*finite"),
        ({"A_ub": [[1.0, 1.0]]}, "A_ub, b_ub: expected both"),
        ({"bounds": [(1, 0), (0, 1)]}, "bounds: .*lower <= upper"),
        ({"blocks": [(simplex(1.0), [1])]}, "blocks: expected 2 variables"),
        ({"blocks": [(Assignment(2), [2])]}, "blocks: block 0 of 2"),
    ],
)
def test_bad_lps_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        linprog_blocks(**({"c": [1.0, 1.0]} | change))
