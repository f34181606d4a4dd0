"""What comes after the solve: policies, whole allocations, sensitivity, pacing, gradients."""

import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polytope_lp import (
    Assignment,
    BlockLP,
    Marketplace,
    MatchingProblem,
    Policy,
    Ranking,
    box_cut,
    generate,
    knapsack,
    ridge_allocation,
    simplex,
    solve,
)
from polytope_lp.serving import policy as serving
from scipy.optimize import Bounds, LinearConstraint, milp


@pytest.fixture(scope="module")
def solution():
    return solve(generate(Marketplace(sources=3000, destinations=30)), 1e-4)


def _arrays(problem):
    d = problem.data
    return d.offsets.numpy(), -d.cost.double().numpy(), d.coefficient.double().numpy(), d.index.numpy()


def test_policy_repeats_the_solution_and_generalizes(solution):
    policy = Policy.from_solution(solution)
    offsets, values, costs, rows = _arrays(solution.problem)
    x = policy.score_sources(offsets, values, costs, rows)
    unrepaired = dataclasses.replace(solution, shrink=None).x().numpy()
    assert np.abs(x - unrepaired).max() <= 1e-9
    # Sources that the solver never saw: twice as many of the same law, so twice the budgets.
    fresh = generate(Marketplace(sources=6000, destinations=30))
    offsets, values, costs, rows = _arrays(fresh)
    unseen = slice(offsets[3000], None)
    x = policy.score_sources(offsets[3000:] - offsets[3000], values[unseen], costs[unseen], rows[unseen])
    load = np.bincount(rows[unseen], costs[unseen] * x, 30)
    binding = solution.lam.numpy() > 0
    assert load[binding].sum() == pytest.approx(solution.load.numpy()[binding].sum(), rel=0.1)
    assert values[unseen] @ x == pytest.approx(-solution.objective, rel=0.1)


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_policies_survive_files(tmp_path, solution, suffix):
    policy = dataclasses.replace(Policy.from_solution(solution), keys=np.array([f"d{j}" for j in range(30)]))
    policy.save(tmp_path / f"p{suffix}")
    again = Policy.load(tmp_path / f"p{suffix}")
    v, a = np.random.default_rng(0).random((2, 5))
    rows = again.rows(["d3", "d1", "d4", "d29", "d0"])
    assert rows.tolist() == [3, 1, 4, 29, 0]
    assert np.array_equal(again.score(v, a, rows), policy.score(v, a, rows))
    with pytest.raises(ValueError, match="'x' is no destination"):
        again.rows(["d3", "x"])
    with pytest.raises(ValueError, match=r"expected \.npz or \.json"):
        policy.save(tmp_path / "p.pickle")
    (tmp_path / f"p{suffix}").write_text("nothing")
    with pytest.raises(ValueError, match="not a policy file"):
        Policy.load(tmp_path / f"p{suffix}")


def test_scoring_needs_numpy_only(tmp_path, solution):
    Policy.from_solution(solution).save(tmp_path / "p.json")
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "scipy", "pyarrow", "core_tensor", "polytope_lp"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import importlib.util, json
spec = importlib.util.spec_from_file_location("scorer", {serving.__file__!r})
scorer = importlib.util.module_from_spec(spec); sys.modules["scorer"] = scorer; spec.loader.exec_module(scorer)
policy = scorer.Policy.load({str(tmp_path / "p.json")!r})
print(json.dumps(policy.score([0.4, 0.2], [1.0, 0.1], [3, 5]).tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == Policy.from_solution(solution).score([0.4, 0.2], [1.0, 0.1], [3, 5]).tolist()


def test_scoring_is_a_matter_of_microseconds(solution):
    policy, random = Policy.from_solution(solution), np.random.default_rng(0)
    v, a, rows = random.random(100), random.random(100), random.integers(0, 30, 100)
    policy.score(v, a, rows)
    started = time.process_time()
    for _ in range(200):
        policy.score(v, a, rows)
    assert (time.process_time() - started) / 200 < 2e-3  # a guard against loops over candidates, no measurement


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 0.1, 1.0, 30.0]), st.booleans(), st.booleans(), st.booleans())
def test_numpy_projection_equals_the_kernels(seed, gamma, equality, weighted, bounded):
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 12))
    r = random.normal(size=n) if seed % 2 else random.integers(-2, 3, n).astype(float)
    w = random.random(n) + 0.2 if weighted else None
    u = random.random(n) + 0.2 if bounded else None
    reach = (np.ones(n) if w is None else w) @ (np.full(n, 3.0) if u is None else u)
    cap = float(random.random() * reach * 0.9 + 0.01)
    kind = knapsack(cap, torch.ones(n, dtype=torch.float64) if w is None else torch.from_numpy(w), None)
    kind = dataclasses.replace(kind, upper=None if u is None else torch.from_numpy(u), equality=equality)
    truth = kind.project(torch.from_numpy(-r / gamma), torch.tensor([0, n])).numpy()
    assert serving.project(r, gamma, cap, u, equality, w) == pytest.approx(truth, abs=1e-9 * max(1.0, 1 / gamma))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 120),
    st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 30.0]),
    st.sampled_from([0.0, 0.3, 1.0, 7.0]),
    st.booleans(),
)
def test_scores_are_the_solvers_own_projection_onto_a_simplex(seed, n, gamma, cap, equality):
    random = np.random.default_rng(seed)
    lam, rows, costs = random.random(40), random.integers(0, 40, n), random.random(n)
    values = random.random(n) if seed % 2 else lam[rows] * costs + random.integers(-1, 2, n) * gamma  # ties
    reduced = lam[rows] * costs - values
    kind = simplex(cap, equality=equality)
    truth = kind.project(torch.from_numpy(-reduced / gamma), torch.tensor([0, n])).numpy()
    x = serving.Policy(lam, gamma, cap, equality=equality).score(values, costs, rows)
    assert x == pytest.approx(truth, abs=1e-12 * max(1.0, 1 / gamma))
    assert x.sum() <= cap * (1 + 1e-14 * n)
    bounded = serving.Policy(lam, gamma, cap, upper=cap, equality=equality)  # bounds that cannot bind
    assert np.array_equal(bounded.score(values, costs, rows), x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scoring_refuses_what_is_no_number(bad):
    for policy in (Policy(np.zeros(2), 1e-3), Policy(np.zeros(2), 1e-3, upper=0.5)):
        with pytest.raises(ValueError, match="values, costs: expected finite"):
            policy.score([0.5, bad], None, [0, 1])
    for cap in (np.nan, -1.0):
        with pytest.raises(ValueError, match="cap: expected"):
            policy.score([0.5, 0.2], None, [0, 1], cap=cap)
    with pytest.raises(ValueError, match="destinations: "):
        policy.score([0.5, 0.2], None, [0, -1])
    assert policy.score([], None, np.zeros(0, np.int64)).shape == (0,)


def test_policies_say_what_differs_by_source(random_problem):
    problem = random_problem(
        3, lambda random, lengths: box_cut(torch.from_numpy(random.random(lengths.size) + 0.5), 0.6)
    )
    policy = Policy.from_solution(solve(problem, 1e-6))
    assert policy.needs == ("cap",)
    with pytest.raises(ValueError, match="cap: differs"):
        policy.score([1.0], [1.0], [0])
    assert policy.score([1.0], [0.0], [0], cap=0.3).tolist() == [0.3]
    with pytest.raises(ValueError, match="destinations: "):
        policy.score([1.0], [1.0], [99], cap=1.0)


def test_policy_after_the_proximal_loop_is_sharp_enough():
    solution = solve(generate(Marketplace(sources=2000, destinations=20, kind="tied")), 1e-4)
    offsets, values, costs, rows = _arrays(solution.problem)
    x = Policy.from_solution(solution).score_sources(offsets, values, costs, rows)
    load = np.bincount(rows, costs * x, 20)
    shrink = np.minimum(1.0, solution.problem.budgets.numpy() / np.maximum(load, 1e-300))
    assert values @ (x * shrink[rows]) >= 0.8 * -solution.objective  # ties cannot be broken by prices alone


FAMILIES = {
    "simplex": lambda random, lengths: simplex(1.0),
    "two": lambda random, lengths: simplex(2.0),
    "box_cut": lambda random, lengths: box_cut(2.0, 1.0),
    "knapsack": lambda random, lengths: knapsack(1.5, torch.from_numpy(random.random(lengths.sum()) + 0.2), 1.0),
}


def _best_whole(problem):
    # Optimum over whole amounts by branch and bound.
    d = problem.data
    n, k = d.variables, d.index.reshape(d.variables, -1).shape[1]
    a = d.coefficient.numpy().ravel()
    A = scipy.sparse.csr_array((a, (d.index.numpy().ravel(), np.repeat(np.arange(n), k))), shape=(problem.rows, n))
    block = np.repeat(np.arange(d.blocks), np.diff(d.offsets.numpy()))
    w = np.ones(n) if d.weight is None else d.weight.numpy()
    B = scipy.sparse.csr_array((w, (block, np.arange(n))), shape=(d.blocks, n))
    upper = np.inf if d.upper is None else d.upper.numpy()
    cap = np.broadcast_to(d.cap.numpy(), (d.blocks,))
    rows = [LinearConstraint(A, ub=problem.budgets.numpy()), LinearConstraint(B, ub=cap)]
    return milp(d.cost.numpy(), constraints=rows, integrality=np.ones(n), bounds=Bounds(0, upper))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 10**6), st.sampled_from([1, 2]), st.booleans())
def test_rounding_is_whole_feasible_bounded_and_maximal(random_problem, kind, seed, rows_per_edge, greedy):
    problem = random_problem(seed, FAMILIES[kind], rows_per_edge=rows_per_edge, slack=2.0)
    solution = solve(problem, 1e-6)
    rounded = solution.rounded("greedy" if greedy else "random", seed)
    d = problem.data
    assert np.array_equal(rounded.x, np.round(rounded.x))
    assert (rounded.load <= problem.budgets.numpy()).all()
    block = np.repeat(np.arange(d.blocks), np.diff(d.offsets.numpy()))
    w = np.ones(d.variables) if d.weight is None else d.weight.numpy()
    assert (np.bincount(block, w * rounded.x, d.blocks) <= np.broadcast_to(d.cap.numpy(), d.blocks) + 1e-9).all()
    best = -_best_whole(problem).fun
    assert rounded.value <= best + 1e-6
    assert best <= rounded.bound + 1e-6
    A = np.zeros((problem.rows, d.variables))
    a = np.ones(d.index.shape) if d.coefficient is None else d.coefficient.double().numpy()
    np.add.at(A, (d.index.numpy().T, np.arange(d.variables)), a.T)
    room = np.broadcast_to(d.cap.numpy(), d.blocks) - np.bincount(block, w * rounded.x, d.blocks)
    left = (problem.budgets.numpy() - rounded.load)[:, None] - A
    fits = (w < room[block] - 1e-9) & (left > 1e-9).all(0) & (rounded.x + 1 <= problem.limits(0, d.blocks).numpy())
    assert not (fits & (d.cost.numpy() < 0)).any()  # no unit of any worth can be added


def test_rounding_loses_little_on_a_marketplace(solution):
    rounded = solution.rounded()
    assert (rounded.load <= solution.problem.budgets.numpy()).all()
    assert rounded.gap <= 0.01
    assert rounded.changed > 0
    again = solution.rounded("random", 7)
    assert np.array_equal(again.x, solution.rounded("random", 7).x)
    assert not np.array_equal(again.x, solution.rounded("random", 8).x)
    with pytest.raises(ValueError, match="method: "):
        solution.rounded("floor")


def test_random_rounding_refuses_equations():
    problem = MatchingProblem.from_arrays([0, 2], [0, 1], [1.0, 2.0], None, [1.0, 0.5], equality=[True, False])
    solution = solve(problem, 1e-4)
    assert solution.rounded().x.tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="method: "):
        solution.rounded("random")


def test_prices_are_derivatives_and_bounds_of_the_value(random_problem, oracle):
    problem = random_problem(11, lambda random, lengths: simplex(1.0), sources=20)
    solution = solve(problem, 1e-8)
    prices = solution.sensitivity()
    for j in range(problem.rows):
        moved = problem.budgets.clone()
        moved[j] += 1e-4
        truth = -oracle(dataclasses.replace(problem, budgets=moved)).fun
        rise = (truth + solution.objective) / 1e-4
        assert prices["price"][j].as_py() == pytest.approx(rise, abs=1e-3)
        assert truth <= solution.value_bound(moved) + 1e-9
    assert truth <= solution.value_bound(problem.budgets * 3) + 1e-9
    assert set(prices.column_names) == {"destination", "budget", "price", "elasticity", "binding"}
    with pytest.raises(ValueError, match="budgets: expected"):
        solution.value_bound([1.0])


def test_pacing_sorts_budgets_into_states(solution):
    budget, planned = solution.problem.budgets.numpy(), solution.load.numpy()
    spent = 0.5 * planned
    spent[0], spent[1], spent[2], spent[3] = budget[0], 0.52 * budget[1] + planned[1], 0.2 * planned[2], 0.0
    report = solution.pacing(spent, 0.5).to_pylist()
    assert report[0]["state"] == "exhausted"
    assert report[1]["state"] in {"over", "exhausted", "ahead"}
    assert report[2]["state"] == "behind"
    assert report[2]["projected"] == pytest.approx(0.4 * planned[2])
    assert {row["state"] for row in report[4:]} == {"on plan"}
    for bad, elapsed, message in (
        (spent[:3], 0.5, "spent: "),
        (spent * np.nan, 0.5, "spent: "),
        (spent, 0.0, "elapsed"),
    ):
        with pytest.raises(ValueError, match=message):
            solution.pacing(bad, elapsed)


KINDS = {
    "simplex": lambda random, lengths: simplex(1.0),
    "box_cut": lambda random, lengths: box_cut(0.9, 0.6),
    "knapsack": lambda random, lengths: knapsack(1.0, torch.from_numpy(random.random(lengths.sum()) + 0.2), 0.7),
}


def _compare_with_differences(problem, values, budgets, gamma, step=1e-6):
    # Derivative of a weighted sum of the allocation along random directions, against central differences.
    random = np.random.default_rng(0)
    values, budgets = values.clone().requires_grad_(), budgets.clone().requires_grad_()
    weights = torch.from_numpy(random.normal(size=values.shape[0]))
    (weights @ ridge_allocation(problem, gamma, values, budgets)).backward()
    for to_values, to_budgets in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        dv = to_values * torch.from_numpy(random.normal(size=values.shape[0]))
        db = to_budgets * torch.from_numpy(random.normal(size=budgets.shape[0]))
        with torch.no_grad():
            ends = [ridge_allocation(problem, gamma, values + t * dv, budgets + t * db) for t in (step, -step)]
        slope = float(weights @ (ends[0] - ends[1])) / (2 * step)
        assert float(values.grad @ dv + budgets.grad @ db) == pytest.approx(slope, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("kind", "rows_per_edge"), [("simplex", 1), ("box_cut", 2), ("knapsack", 1)])
def test_gradients_through_the_solver_are_those_of_differences(random_problem, kind, rows_per_edge):
    problem = random_problem(5, KINDS[kind], sources=6, rows_per_edge=rows_per_edge)
    _compare_with_differences(problem, -problem.data.cost.double(), problem.budgets, 0.05)


def test_gradients_through_slots_and_rankings():
    A = np.random.default_rng(0).random((2, 11))
    blocks = [(Assignment(2, filled=False), [6]), (Ranking([1.0, 0.5]), [5])]
    lp = BlockLP.build(-np.random.default_rng(1).random(11), A, [1.0, 1.1], blocks=blocks)
    _compare_with_differences(lp, torch.from_numpy(-lp.c), torch.from_numpy(lp.b), 0.1)


def test_smoothed_allocation_solves_its_qp(random_problem):
    problem = random_problem(6, KINDS["simplex"], sources=12)
    x = ridge_allocation(problem, 1e-3)
    d = problem.data
    load = torch.zeros(problem.rows, dtype=torch.float64).index_add_(0, d.index.long(), d.coefficient * x)
    assert bool((load <= problem.budgets * (1 + 1e-9) + 1e-12).all())
    best = solve(problem, 1e-7)
    assert best.objective - 1e-6 <= float(d.cost @ x) <= best.objective + 1e-3 * float(x.square().sum()) + 1e-6
    with pytest.raises(ValueError, match="values: "):
        ridge_allocation(problem, 1e-3, torch.ones(2, dtype=torch.float64))
    impossible = MatchingProblem.from_arrays([0, 1], [0], [1.0], None, [3.0], equality=[True])
    with pytest.raises(ValueError, match="budgets: no allocation"):
        ridge_allocation(impossible, 1e-2)
