import itertools

import pytest
import torch
from core_tensor.dev.testing import assert_close
from quantease import LayerConfig, Outliers, quantize_layer, relative_error
from quantease.algorithms.outliers import largest_eigenvalue, outlier_descent, outlier_iht, top_mask
from quantease.evaluation.synthetic import synthetic_layer


def _heavy(problem):
    problem.weight.pow_(3)
    return problem


@pytest.mark.parametrize("structure", ["unstructured", "structured"])
@pytest.mark.parametrize("algorithm", ["quantease-paper", "quantease"])
def test_at_most_two_to_the_b_levels_off_the_mask_and_the_budget_is_kept(make_problem, algorithm, structure):
    problem = _heavy(make_problem(20, 60))
    config = LayerConfig(algorithm=algorithm, bits=2, outliers=0.05, structure=structure)
    layer = quantize_layer(problem.weight, problem.sigma, config)
    mask = torch.zeros(20, 60, dtype=torch.bool)
    mask[layer.outliers.rows, layer.outliers.columns.long()] = True
    assert int(mask.sum()) <= 60
    if structure == "structured":
        assert int(mask.any(0).sum()) <= 3
    values = layer.dequantize()
    for i in range(20):
        assert len(values[i][~mask[i]].unique()) <= 4
    if algorithm == "quantease":
        assert bool((layer.codes[mask] == layer.zeros.expand(20, 60)[mask]).all())
        assert layer.report.cw_minimum is True
    without = quantize_layer(problem.weight, problem.sigma, LayerConfig(algorithm=algorithm, bits=2, grid=config.grid))
    assert layer.report.calibration_error < without.report.calibration_error
    assert layer.report.objective == pytest.approx(
        relative_error(problem.weight, layer.dequantize(torch.float64), problem.sigma), rel=1e-6
    )


@pytest.mark.parametrize("structure", ["unstructured", "structured"])
def test_hard_thresholding_never_raises_the_objective_once_quantised(make_problem, structure):
    problem = _heavy(make_problem(20, 60, dtype=torch.float64))
    config = LayerConfig(algorithm="quantease-paper", outliers=0.05, structure=structure, relax=0, sweeps=15)
    values = [value for _, value in outlier_iht(problem, config).trace]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(values))
    assert values[-1] < values[0]


@pytest.mark.parametrize(("bits", "fraction"), [(3, 0.01), (2, 0.02)])
def test_mixed_descent_beats_hard_thresholding_at_equal_storage(bits, fraction):
    layer = synthetic_layer("A", seed=0, features=256, rows=128)
    results = [
        quantize_layer(layer.weight, layer.gram, LayerConfig(algorithm=name, bits=bits, outliers=fraction)).report
        for name in ("quantease", "quantease-paper")
    ]
    assert results[0].bits_per_weight == results[1].bits_per_weight
    assert results[0].calibration_error <= 0.55 * results[1].calibration_error


def test_outliers_are_at_their_minimum_given_the_codes(make_problem):
    problem = _heavy(make_problem(6, 40, dtype=torch.float64))
    config = LayerConfig(outliers=0.1, scale_dtype="float32", sweeps=200, refits=0)
    solution = outlier_descent(problem, config)
    residual = (
        problem.weight
        - solution.candidate.sparse
        - solution.candidate.grid.dequantize(solution.candidate.codes, torch.float64)
    )
    gradient = residual @ problem.sigma
    assert float(gradient[solution.mask].abs().max()) < 1e-2 * float(gradient.abs().max())


def test_support_sizes():
    score = torch.rand(7, 30, generator=torch.Generator().manual_seed(0))
    mask = top_mask(score, LayerConfig(outliers=0.05))
    assert int(mask.sum()) == round(0.05 * 210)
    assert float(score[mask].min()) >= float(score[~mask].max())
    columns = top_mask(score, LayerConfig(outliers=0.1, structure="structured"))
    assert int(columns.all(0).sum()) == 3
    assert int(columns.sum()) == 21


def test_sparse_rows_round_trip():
    dense = torch.randn(5, 9) * (torch.rand(5, 9) < 0.3)
    sparse = Outliers.from_dense(dense, dense != 0, torch.float16)
    assert torch.equal(sparse.to_dense(9), dense.half().float())
    assert sparse.offsets.tolist() == [0, *torch.cumsum((dense != 0).sum(1), 0).tolist()]
    assert bool((sparse.columns.diff()[sparse.rows.diff() == 0] > 0).all())


def test_largest_eigenvalue(make_problem):
    sigma = make_problem(1, 40).sigma
    truth = torch.linalg.eigvalsh(sigma.double())[-1]
    value = torch.tensor(largest_eigenvalue(sigma))
    assert_close("eigenvalue", truth, value, 1e-3)
    assert largest_eigenvalue(torch.zeros(3, 3)) == 1.0
