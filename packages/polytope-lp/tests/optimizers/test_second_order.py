"""Newton steps on the smoothed dual: the Hessian by differences, and the same optimum as the first-order road."""

import dataclasses

import pytest
import torch
from polytope_lp import Marketplace, box, box_cut, generate, knapsack, simplex, solve
from polytope_lp.matching.evaluation import FusedDual

FAMILIES = {
    "box": lambda random, lengths: box(0.8),
    "simplex": lambda random, lengths: simplex(torch.from_numpy(random.random(lengths.size) + 0.1)),
    "simplex_eq": lambda random, lengths: simplex(1.0, equality=True),
    "box_cut": lambda random, lengths: box_cut(0.9, 0.6),
    "knapsack": lambda random, lengths: knapsack(1.0, torch.from_numpy(random.random(lengths.sum()) + 0.2), 0.7),
}


@pytest.mark.parametrize("rows_per_edge", [1, 2])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_curvature_is_the_derivative_of_the_gradient(random_problem, kind, rows_per_edge):
    dual = FusedDual(random_problem(7, FAMILIES[kind], sources=20, rows_per_edge=rows_per_edge))
    generator = torch.Generator().manual_seed(3)
    m = dual.budgets.shape[0]
    lam = torch.rand(m, generator=generator, dtype=torch.float64)
    anchor = torch.rand(dual.variables, generator=generator, dtype=torch.float64)
    for center in (None, anchor):
        H = dual.curvature(lam, 0.3, center)
        for j in range(m):
            step = torch.zeros(m, dtype=torch.float64)
            step[j] = 1e-6
            ahead = dual.evaluate(lam + step, 0.3, center).gradient
            behind = dual.evaluate(lam - step, 0.3, center).gradient
            torch.testing.assert_close(-(ahead - behind) / 2e-6, H[:, j], atol=1e-5, rtol=1e-5)


def test_newton_and_lbfgs_meet():
    problem = generate(Marketplace(sources=400, destinations=20, degree=5.0, seed=2))
    newton, first_order = (solve(problem, 1e-7, method=method) for method in ("newton", "lbfgs"))
    assert newton.status == first_order.status == "optimal"
    assert newton.objective == pytest.approx(first_order.objective, rel=2e-7)
    assert newton.evaluations < first_order.evaluations
    assert newton.verify()["ok"]


def test_newton_takes_over_where_lbfgs_makes_no_progress(monkeypatch):
    from polytope_lp.matching import continuation

    impatient = dataclasses.replace(continuation.TUNING, small_rows=0, patience=5)
    monkeypatch.setattr(continuation, "TUNING", impatient)
    seen = []
    monkeypatch.setattr(
        continuation.second_order, "step", lambda *a, step=continuation.second_order.step: seen.append(1) or step(*a)
    )
    problem = generate(Marketplace(sources=400, destinations=20, degree=5.0, kind="tied", seed=2))
    solution = solve(problem, 1e-7)
    assert seen
    assert solution.status == "optimal"
    assert solution.verify()["ok"]


def test_a_stopped_newton_run_resumes_to_the_same_bits(tmp_path):
    problem = generate(Marketplace(sources=400, destinations=20, degree=5.0, seed=2))
    path = tmp_path / "state.npz"
    whole = solve(problem, 1e-7)
    solve(problem, 1e-7, evaluations=whole.evaluations // 2, checkpoint=path, checkpoint_every=1)
    resumed = solve(problem, 1e-7, checkpoint=path)
    assert torch.equal(resumed.lam, whole.lam)
    assert resumed.evaluations == whole.evaluations
