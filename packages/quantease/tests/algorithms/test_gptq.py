import numpy as np
import pytest
import torch
from core_tensor.dev.testing import assert_close
from quantease.algorithms.gptq import gptq, gptq_with_gradient, upper_factor


def _obq(W, sigma, grid, damping, order):
    """Optimal brain quantization in a fixed order: eliminate one feature of the inverse after the other."""
    W, H = W.double().numpy().copy(), sigma.double().numpy().copy()
    H[np.diag_indices_from(H)] += damping * np.diag(H).mean()
    inverse = np.linalg.inv(H)
    scale, zero = (t.double().numpy()[:, grid.group.numpy()] for t in (grid.scale, grid.zero))
    codes = np.zeros(W.shape, dtype=np.uint8)
    for j in order:
        code = np.clip(np.round(W[:, j] / scale[:, j]) + zero[:, j], 0, grid.max_code)
        codes[:, j] = code
        error = W[:, j] - scale[:, j] * (code - zero[:, j])
        W -= np.outer(error / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.from_numpy(codes)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_equals_optimal_brain_quantization_in_the_same_order(make_problem, make_minmax, act_order, group_size, block):
    problem = make_problem(11, 30, dtype=torch.float64, seed=5)
    grid = make_minmax(problem, group_size=group_size)
    order = torch.argsort(problem.energy, descending=True, stable=True) if act_order else torch.arange(30)
    expected = _obq(problem.weight, problem.sigma, grid, 0.01, order.tolist())
    assert torch.equal(gptq(problem, grid, act_order=act_order, block=block), expected)


def test_upper_factor(make_problem):
    sigma = make_problem(2, 25, dtype=torch.float64).sigma
    R = upper_factor(sigma, 0.05)
    damped = sigma + 0.05 * sigma.diagonal().mean() * torch.eye(25, dtype=torch.float64)
    assert torch.equal(R, R.triu())
    assert_close("RR'", damped, R @ R.T, 1e-12)


def test_singular_gram_matrices_and_dead_features_need_the_damping(make_problem, make_minmax):
    problem = make_problem(6, 20, rank=3, dead=(0, 7))
    grid = make_minmax(problem)
    codes = gptq(problem, grid)
    assert torch.equal(codes[:, [0, 7]], grid.quantize(problem.weight)[:, [0, 7]])  # nothing to compensate
    with pytest.raises(ValueError, match="damping: expected enough"):
        gptq(make_problem(6, 20, rank=3, dtype=torch.float64), grid, damping=0.0)
    zero = make_problem(6, 20, dead=range(20))
    assert torch.equal(gptq(zero, grid), grid.quantize(zero.weight))


def test_beats_rounding_to_nearest(make_problem, make_minmax):
    problem = make_problem(40, 64)
    grid = make_minmax(problem)
    nearest = problem.candidate(grid.quantize(problem.weight), grid)
    assert problem.candidate(gptq(problem, grid), grid).total < 0.8 * nearest.total


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_gradient_comes_with_the_codes(make_problem, make_minmax, act_order, damping, block):
    problem = make_problem(11, 30, dtype=torch.float64, dead=(3,) if damping else ())
    grid = make_minmax(problem)
    options = {"act_order": act_order, "damping": damping, "block": block}
    codes, gradient = gptq_with_gradient(problem, grid, **options)
    assert torch.equal(codes, gptq(problem, grid, **options))
    assert_close("gradient", (problem.weight - grid.dequantize(codes, torch.float64)) @ problem.sigma, gradient, 1e-10)
