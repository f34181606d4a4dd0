"""`quantize_layer`: one weight matrix, one Gram matrix, every algorithm by name."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from core_tensor.checks import check_tensor
from torch import Tensor

from quantease.algorithms.certified import gptq_descent
from quantease.algorithms.gptq import gptq
from quantease.algorithms.heldout import HeldOut, choose_shrinkage, make_grid
from quantease.algorithms.outliers import outlier_descent, outlier_iht
from quantease.algorithms.pipeline import quantease
from quantease.algorithms.relaxed import relaxed_descent
from quantease.algorithms.rtn import rtn
from quantease.problem.config import LayerConfig
from quantease.problem.gram import GramFolds, Shrinkage
from quantease.problem.layer import LayerReport, Outliers, QuantizedLayer, bits_per_weight
from quantease.problem.objective import relative_error
from quantease.problem.problem import Candidate, Problem, Solution, Trace


def quantize_layer(
    weight: Tensor, gram: Tensor | GramFolds, config: LayerConfig | None = None, *, choice: HeldOut | None = None
) -> QuantizedLayer:
    r"""Quantize a linear layer for the inputs it sees.

    $$ \min_{\hat W} \operatorname{tr}\,(W - \hat W)\,\Sigma\,(W - \hat W)^\top \quad\text{with every } \hat W_{ij}
    \text{ on the grid of its row (and group)} $$

    Args:
        weight: W, shape (q, p): q output features, p inputs. Any floating dtype; the arithmetic is float32 and
            float64.
        gram: $\Sigma = X X^\top$ of the calibration inputs, shape (p, p), or the folds it was accumulated in; only
            the latter allow a choice of the shrinkage on held-out tokens.
        config: Algorithm and options; None is `LayerConfig()`.
        choice: Shrinkage and grid that were chosen already, for this matrix or for all that read the same input.

    Returns:
        Codes, scales, zero points, outliers and a report.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If shapes do not fit or values are not finite, or the Gram matrix has a negative diagonal.

    Source: arXiv 2309.01885.
    """
    start = time.perf_counter()
    config = config or LayerConfig()
    check_tensor("weight", weight, ndim=2, finite=True, nonempty=True)
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating dtype, got {weight.dtype}")
    sigma = gram.total if isinstance(gram, GramFolds) else gram
    features = weight.shape[1]
    check_tensor("gram", sigma, shape=(features, features), dtype=(torch.float32, torch.float64), finite=True)
    if bool((sigma.diagonal() < 0).any()):
        raise ValueError("gram: expected a non-negative diagonal, got a negative entry")
    W = weight.detach().float()
    heldout = choice or choose(W, gram, config)
    config = replace(config, grid="clip" if heldout.clip else "minmax")
    problem = Problem.scaled(W, heldout.shrinkage(sigma.to(W.device)))
    solved = _solve(problem, config)
    outliers = None
    if solved.mask is not None and solved.candidate.sparse is not None:
        outliers = Outliers.from_dense(solved.candidate.sparse, solved.mask, config.storage)
    grid = solved.candidate.grid
    report = LayerReport(
        algorithm=config.algorithm,
        bits_per_weight=bits_per_weight(grid, config.bits, config.symmetric, config.storage, outliers),
        calibration_error=0.0,
        heldout_error=heldout.error,
        shrinkage=heldout.shrinkage,
        grid="clip" if heldout.clip else "minmax",
        objective=solved.candidate.total / problem.scale,
        trace=solved.trace,
        cw_minimum=None if solved.certificate is None else solved.certificate.holds,
        row_gaps=None if solved.certificate is None else solved.certificate.gaps,
        starts=solved.starts,
        tokens=gram.tokens if isinstance(gram, GramFolds) else None,
    )
    layer = QuantizedLayer(
        codes=solved.candidate.codes,
        scales=grid.scale.to(config.storage),
        zeros=grid.zero.to(torch.uint8),
        group=grid.group,
        bits=config.bits,
        symmetric=config.symmetric,
        outliers=outliers,
        report=report,
    )
    error = _calibration_error(problem, solved.candidate, heldout.shrinkage)
    if error is None or outliers is not None:
        error = relative_error(W, layer.dequantize(), sigma)
    return replace(layer, report=replace(report, calibration_error=error, seconds=time.perf_counter() - start))


def _calibration_error(problem: Problem, found: Candidate, shrinkage: Shrinkage) -> float | None:
    """The relative error without shrinkage, from the objectives with it; None where those do not say."""
    # tr(D Sigma D') = (tr(D Sigma_t D') - t tr(D T D')) / (1 - t), and T is known: its diagonal is that of Sigma_t
    t = shrinkage.strength
    if t > 0.95:
        return None
    energy = problem.energy.double()
    target = energy if shrinkage.target == "diagonal" else energy.mean().expand_as(energy)

    def without(total: float, values: Tensor) -> float:
        return total - t * float(values.double().square().sum(0) @ target)

    size = without(problem.scale, problem.weight)
    error = without(found.total, problem.weight - found.grid.dequantize(found.codes))
    return max(error, 0.0) / size if size > 0 else None


def choose(
    weights: Tensor | Sequence[Tensor],
    gram: Tensor | GramFolds,
    config: LayerConfig,
    start: tuple[Shrinkage, bool] | None = None,
) -> HeldOut:
    """The shrinkage and grid that a configuration asks for, by held-out tokens where it leaves the choice to them.

    Args:
        weights: W, shape (q, p), or several matrices that read the same input.
        gram: Their Gram matrix or its folds.
        config: Options.
        start: Where to look first; see `choose_shrinkage`.

    Returns:
        The choice.

    Raises:
        TypeError: If held-out tokens are asked for and there are no folds.
    """
    if isinstance(config.shrinkage, Shrinkage):
        return HeldOut(config.shrinkage, config.clips)
    folds = isinstance(gram, GramFolds)
    if config.shrinkage == "none" or (config.shrinkage == "auto" and not (folds and config.shrinks)):
        return HeldOut(Shrinkage(), config.clips)
    if not isinstance(gram, GramFolds):
        raise TypeError(f"gram: expected GramFolds with shrinkage 'heldout', got {type(gram).__name__}")
    return choose_shrinkage(weights, gram, config, start)


def _solve(problem: Problem, config: LayerConfig) -> Solution:
    if config.outliers:
        return (
            outlier_iht(problem, config) if config.algorithm == "quantease-paper" else outlier_descent(problem, config)
        )
    if config.algorithm == "quantease":
        return quantease(problem, config)
    grid = make_grid(problem.weight, problem.energy, config, clip=config.clips)
    trace: Trace = ()
    if config.algorithm == "gptq-descent":
        codes, certificate = gptq_descent(problem, grid, damping=config.damping, act_order=config.act_order)
        return Solution(problem.candidate(codes, grid), certificate)
    if config.algorithm == "rtn":
        codes = rtn(problem.weight, grid)
    elif config.algorithm == "gptq":
        codes = gptq(problem, grid, damping=config.damping, act_order=config.act_order)
    else:
        sweeps = 30 if config.sweeps is None else config.sweeps
        codes, trace = relaxed_descent(
            problem, grid, problem.weight, sweeps=sweeps, relax=config.relax, block=config.block
        )
    return Solution(problem.candidate(codes, grid), trace=trace)
