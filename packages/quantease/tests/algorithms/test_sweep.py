"""The blocked sweep against the column loop of the paper, and the laws of coordinate descent."""

import numpy as np
import pytest
import torch
from core_tensor.dev.testing import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from quantease.algorithms.relaxed import relaxed_descent
from quantease.algorithms.sweep import Sweeper, schedule
from quantease.problem.grid import group_index, minmax_grid
from quantease.problem.objective import row_objective
from quantease.problem.problem import Problem


def _column_loop(W, sigma, What, grid, quantize=True, mask=None):
    """Algorithm 2 of the paper in numpy, one column after the other."""
    W, sigma, What = (t.double().numpy().copy() for t in (W, sigma, What))
    scale, zero = (t.double().numpy()[:, grid.group.numpy()] for t in (grid.scale, grid.zero))
    for j in range(W.shape[1]):
        others = np.arange(W.shape[1]) != j
        beta = W[:, j].copy()
        if sigma[j, j] > 0:
            beta += (W - What)[:, others] @ sigma[others, j] / sigma[j, j]
        new = scale[:, j] * (np.clip(np.round(beta / scale[:, j]) + zero[:, j], 0, grid.max_code) - zero[:, j])
        keep = np.full(len(beta), not quantize) if mask is None else np.asarray(mask)[:, j] | (not quantize)
        What[:, j] = np.where(keep, beta, new)
    return torch.from_numpy(What)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 23), st.integers(1, 30), st.sampled_from([-1, 5]), st.booleans(), st.booleans(), st.integers(0, 99)
)
def test_blocked_equals_column_loop_in_float64_for_any_block(p, block, group_size, masked, singular, seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(p, 2 if singular else 2 * p, generator=generator, dtype=torch.float64)
    if p > 3:
        factor[1] = 0.0  # a dead feature
    problem = Problem(torch.randn(6, p, generator=generator, dtype=torch.float64), factor @ factor.T)
    grid = minmax_grid(problem.weight, bits=3, group=group_index(p, group_size))
    mask = torch.rand(6, p, generator=generator) < 0.2 if masked else None
    sweeper = Sweeper(problem, grid, mask=mask, block=block)
    start = torch.randn(6, p, generator=generator, dtype=torch.float64)
    residual, expected = sweeper.residual(start), start
    for quantize in (True, False, True):
        sweeper.sweep(residual, quantize=quantize)
        expected = _column_loop(problem.weight, problem.sigma, expected, grid, quantize, mask)
        assert_close("sweep", expected, sweeper.values(residual), 1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.sampled_from([-1, 7]), st.sampled_from([2, 60]), st.integers(0, 99))
def test_quantised_sweeps_never_raise_the_objective(bits, group_size, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(20, rank, generator=generator, dtype=torch.float64)
    problem = Problem(torch.randn(8, 20, generator=generator, dtype=torch.float64), factor @ factor.T)
    grid = minmax_grid(problem.weight, bits=bits, group=group_index(20, group_size))
    sweeper = Sweeper(problem, grid, block=8)
    residual = sweeper.residual(grid.dequantize(grid.quantize(problem.weight), torch.float64))
    before = row_objective(residual.T / sweeper.unit, problem.sigma)
    for _ in range(6):
        sweeper.sweep(residual)
        after = row_objective(residual.T / sweeper.unit, problem.sigma)
        assert bool((after <= before * (1 + 1e-12) + 1e-12 * problem.scale).all())
        before = after


def test_masked_coordinates_stay_continuous_and_the_rest_on_the_grid(make_problem, make_minmax):
    problem = make_problem(12, 40, dtype=torch.float64)
    mask = torch.rand(12, 40, generator=torch.Generator().manual_seed(3)) < 0.1
    mask[5, -1] = True
    grid = make_minmax(problem, bits=2, mask=mask)
    sweeper = Sweeper(problem, grid, mask=mask, block=16)
    residual = sweeper.residual(problem.weight)
    sweeper.sweep(residual)
    values = sweeper.values(residual)
    on_grid = grid.dequantize(grid.quantize(values), torch.float64)
    assert_close("on the grid", on_grid[~mask], values[~mask], 1e-12)
    assert float((on_grid - values)[mask].abs().min()) > 0
    for i in range(12):
        assert len(grid.quantize(values)[i][~mask[i]].unique()) <= 4
    gradient = problem.sigma @ residual  # a masked coordinate at the end of the sweep is at its minimum
    assert bool(mask[:, -1].any())
    assert float(gradient.T[mask[:, -1], -1].abs().max()) < 1e-9


def test_tracked_objective_is_the_objective(make_problem, make_minmax):
    problem = make_problem(10, 33, dtype=torch.float64, dead=(4,))
    sweeper = Sweeper(problem, make_minmax(problem), block=10)
    residual = sweeper.residual(problem.weight)
    objective = torch.zeros(10, dtype=torch.float64)
    for quantize in (True, False, True):
        sweeper.sweep(residual, quantize=quantize, objective=objective)
        assert_close("objective", row_objective(residual.T, problem.sigma), objective, 1e-10)


def test_relaxed_sweeps_alone_reach_the_weights(make_problem, make_minmax):
    problem = make_problem(5, 6, dtype=torch.float64)
    sweeper = Sweeper(problem, make_minmax(problem), block=4)
    residual = sweeper.residual(torch.zeros(5, 6, dtype=torch.float64))
    for _ in range(100):
        sweeper.sweep(residual, quantize=False)  # Gauss-Seidel on Sigma (w - w_hat) = 0
    assert float(row_objective(residual.T, problem.sigma).sum()) < 1e-6 * problem.scale


def test_schedule_is_the_paper_s():
    plan = schedule(30, 3)
    assert [t for t, quantised in enumerate(plan) if not quantised] == [1, 4, 7, 10, 13, 16, 19, 22, 25]
    assert schedule(2, 3) == [True, True]  # the last sweep is always quantised
    assert schedule(5, 0) == [True] * 5


@pytest.mark.parametrize("keep_best", [False, True])
def test_relaxed_descent_ends_on_the_grid_and_keeps_the_best(make_problem, make_minmax, keep_best):
    problem = make_problem(16, 48)
    grid = make_minmax(problem)
    codes, trace = relaxed_descent(problem, grid, problem.weight, sweeps=12, keep_best=keep_best, block=16)
    final = problem.candidate(codes, grid).total / problem.scale
    quantised = [value for name, value in trace if "relaxed" not in name]
    assert len(trace) == 12
    if keep_best:
        assert final <= min(quantised) * (1 + 1e-4)
    else:
        assert final == pytest.approx(quantised[-1], rel=1e-4)
    assert min(value for name, value in trace if "relaxed" in name) < min(quantised)
