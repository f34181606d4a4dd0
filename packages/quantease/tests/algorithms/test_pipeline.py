"""The default pipeline: guarantees per row, certificate, scale refit, held-out choice of the shrinkage."""

import pytest
import torch
from core_tensor.dev.testing import assert_close
from quantease import GramFolds, LayerConfig, Shrinkage, quantize_layer, relative_error
from quantease.algorithms.descent import certify, descend
from quantease.algorithms.pipeline import quantease
from quantease.algorithms.refit import refit_scales
from quantease.problem.objective import row_objective


def _folds(p, tokens, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(p, p, generator=generator) * torch.arange(1, p + 1) ** -0.7
    gram = GramFolds(p, segment=16, **options)
    gram.update(torch.randn(tokens, p, generator=generator) @ mixing)
    return gram, mixing @ mixing.T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 2},
        {"bits": 4, "group_size": 16},
        {"symmetric": True},
        {"bits": 1},
        {"grid": "minmax", "scale_dtype": "bfloat16"},
        {"shrinkage": Shrinkage(0.3, "identity")},
    ],
)
def test_no_row_is_worse_than_rtn_or_gptq_as_exported(options):
    gram, _ = _folds(48, 60)
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
    layer = quantize_layer(weight, gram, LayerConfig(**options))
    sigma = layer.report.shrinkage(gram.total)
    ours = row_objective(weight.double() - layer.dequantize(torch.float64), sigma)
    for algorithm in ("rtn", "gptq"):
        for grid in ("minmax", "clip"):
            fixed = {**options, "algorithm": algorithm, "grid": grid, "shrinkage": layer.report.shrinkage}
            other = quantize_layer(weight, gram, LayerConfig(**fixed))
            theirs = row_objective(weight.double() - other.dequantize(torch.float64), sigma)
            assert bool((ours <= theirs * (1 + 1e-9)).all()), (algorithm, grid)
    assert layer.report.cw_minimum is True
    assert sum(layer.report.starts.values()) == 32
    assert layer.report.objective == pytest.approx(relative_error(weight, layer.dequantize(torch.float64), sigma))


@pytest.mark.parametrize("rank", [3, 60])
def test_singular_gram_dead_features_and_degenerate_rows(make_problem, rank):
    problem = make_problem(8, 24, rank=rank, dead=(2, 5))
    problem.weight[0] = 0.0
    problem.weight[1] = 0.5
    solution = quantease(problem, LayerConfig())
    assert solution.certificate.holds
    assert float(solution.candidate.objective[0]) == 0.0
    descending = [value for name, value in solution.trace if name.startswith(("best", "refit"))]
    assert descending == sorted(descending, reverse=True)
    assert descending[0] <= min(value for _, value in solution.trace[:-5])


@pytest.mark.parametrize("options", [{}, {"bits": 2, "group_size": 8}, {"thorough": True, "symmetric": True}])
def test_the_carried_gradient_is_that_of_the_solution(make_problem, options):
    """What refits and the certificate build on, against a product formed from the codes."""
    problem = make_problem(40, 32, seed=3)
    found = quantease(problem, LayerConfig(**options))
    residual = problem.weight.double() - found.candidate.grid.dequantize(found.candidate.codes, torch.float64)
    assert_close("gradient", residual @ problem.sigma.double(), found.candidate.gradient, 1e-13)
    assert_close("objective", row_objective(residual, problem.sigma), found.candidate.objective, 1e-12)
    fresh = certify(problem, problem.candidate(found.candidate.codes, found.candidate.grid))
    assert fresh.holds
    assert found.certificate.holds


def test_further_refits_only_lower_the_objective_and_match_those_of_whole_matrices(make_problem):
    """The rows that a round leaves out would not have changed: against rounds that redo every row from its codes."""
    problem = make_problem(40, 32, seed=4)
    start = quantease(problem, LayerConfig(refits=0)).candidate
    best = start
    for refits in (1, 2, 3):
        grid = refit_scales(problem, best, storage=torch.float16)
        best = best.best_rows(descend(problem, problem.unevaluated(best.codes, grid)))
        found = quantease(problem, LayerConfig(refits=refits)).candidate
        assert torch.equal(found.codes, best.codes)
        assert torch.equal(found.grid.scale, best.grid.scale)
    assert best.total < start.total


def test_refit_is_the_least_squares_scale(make_problem, make_minmax):
    problem = make_problem(10, 30, dtype=torch.float64)
    grid = make_minmax(problem)
    candidate = problem.candidate(grid.quantize(problem.weight * 0.7), grid)
    refitted = refit_scales(problem, candidate, storage=torch.float32)
    centred = candidate.codes.double() - grid.zero.double()
    factor = torch.linalg.cholesky(problem.sigma)  # f = |L'(w - s v)|^2
    for i in range(10):
        s = torch.linalg.lstsq((centred[i] @ factor)[:, None], (problem.weight[i] @ factor)[:, None]).solution
        assert float(refitted.scale[i, 0]) == pytest.approx(float(s), rel=1e-6)


def test_refit_by_groups_never_raises_the_objective(make_problem, make_minmax):
    problem = make_problem(10, 30)
    grid = make_minmax(problem, group_size=8)
    candidate = problem.candidate(grid.quantize(problem.weight), grid)
    refitted = refit_scales(problem, candidate, storage=torch.float32)
    assert bool((problem.candidate(candidate.codes, refitted).objective <= candidate.objective * (1 + 1e-5)).all())
    assert problem.candidate(candidate.codes, refitted).total < 0.95 * candidate.total


def test_heldout_choice_shrinks_when_tokens_are_few_and_hardly_when_they_abound():
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    chosen = {}
    for tokens in (64, 20_000):
        gram, truth = _folds(64, tokens)
        layer = quantize_layer(weight, gram)
        plain = quantize_layer(weight, gram, LayerConfig(shrinkage="none"))
        errors = [relative_error(weight, result.dequantize(), truth) for result in (layer, plain)]
        chosen[tokens] = (layer.report.shrinkage.strength, *errors)
        assert layer.report.heldout_error == pytest.approx(errors[0], rel=1.5)
        assert plain.report.heldout_error is None
    assert chosen[64][0] >= 0.1 > chosen[20_000][0]
    assert chosen[64][1] < 0.8 * chosen[64][2]
    assert chosen[20_000][1] < 1.1 * chosen[20_000][2]


def test_one_fold_falls_back_to_the_closed_form_and_says_so():
    gram, _ = _folds(20, 50, folds=1)
    report = quantize_layer(torch.randn(5, 20), gram).report
    assert report.shrinkage.target == "identity"
    assert 0 < report.shrinkage.strength < 1
    assert report.heldout_error is None


def test_float64_gram_gives_the_same_codes_as_float32():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    gram, _ = _folds(32, 500)
    double, _ = _folds(32, 500, dtype=torch.float64)
    a, b = quantize_layer(weight, gram), quantize_layer(weight, double)
    assert a.report.shrinkage == b.report.shrinkage
    assert float((a.codes != b.codes).float().mean()) < 0.02
    assert_close("error", torch.tensor(a.report.objective), torch.tensor(b.report.objective), 0.01)
