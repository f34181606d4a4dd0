"""Many small problems in one call: the answers of single calls, each with its own certificate."""

import numpy as np
import pytest
import torch
from polytope_lp import BlockLP, Marketplace, box_cut, generate, simplex, solve, solve_many


def test_many_small_problems_equal_single_calls(random_problem, wide_markets):
    problems = [random_problem(seed, lambda *_: simplex(1.0), sources=5 + seed % 7) for seed in range(6)]
    problems += [random_problem(20 + seed, lambda *_: box_cut(1.5, 0.7), rows_per_edge=2) for seed in range(2)]
    problems += [wide_markets.wide_market(seed, equations=seed % 2 == 0) for seed in range(6)]
    problems.insert(5, generate(Marketplace(sources=400, destinations=12)))  # too large for a stack
    for problem, solution in zip(problems, solve_many(problems, 1e-6), strict=True):
        alone = solve(problem, 1e-6)
        assert solution.problem is problem
        assert solution.status == alone.status
        assert solution.gap <= 1e-6
        size = max(abs(alone.lower_bound), alone.unit)
        assert abs(solution.objective - alone.objective) <= 2e-6 * size
        assert solution.verify()["ok"], solution.verify()["problems"]


def test_units_of_value_do_not_matter_in_a_stack(random_problem):
    one, other = (random_problem(3, lambda *_: simplex(1.0)) for _ in range(2))
    tiny = type(one).from_arrays(
        one.data.offsets, one.data.index, -one.data.cost * 1e-9, one.data.coefficient, one.budgets
    )
    huge = type(one).from_arrays(
        one.data.offsets, one.data.index, -one.data.cost * 1e9, one.data.coefficient, one.budgets
    )
    values = [solution.objective for solution in solve_many([other, tiny, huge], 1e-7)]
    assert values[1] * 1e9 == pytest.approx(values[0], rel=1e-7)
    assert values[2] * 1e-9 == pytest.approx(values[0], rel=1e-7)


def test_one_infeasible_problem_does_not_spoil_the_others(random_problem):
    good = random_problem(1, lambda *_: simplex(1.0))
    d = good.data
    bad = type(good).from_arrays(
        d.offsets,
        d.index,
        -d.cost,
        d.coefficient,
        torch.full_like(good.budgets, 1e6),
        at_least=np.ones(good.rows, bool),
    )
    assert [solution.status for solution in solve_many([good, bad, good])] == ["optimal", "infeasible", "optimal"]


def test_what_is_no_problem_is_refused(random_problem, tmp_path):
    good = random_problem(1, lambda *_: simplex(1.0))
    with pytest.raises(TypeError, match="got BlockLP"):
        solve_many([good, BlockLP.build([1.0], bounds=[(0, 1)])])
    with pytest.raises(ValueError, match="checkpoint"):
        solve_many([good], checkpoint=tmp_path / "c.npz")
    assert solve_many([]) == []
