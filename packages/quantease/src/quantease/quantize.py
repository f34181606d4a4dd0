"""`quantize_layer`: one weight matrix, one Gram matrix, every algorithm by name."""

import time

import torch
from core_tensor.checks import check_tensor
from torch import Tensor

from quantease.config import LayerConfig
from quantease.gram import GramFolds, Shrinkage
from quantease.grid import Grid, group_index, minmax_grid
from quantease.layer import LayerReport, Outliers, QuantizedLayer, bits_per_weight
from quantease.objective import relative_error
from quantease.rtn import rtn


def quantize_layer(weight: Tensor, gram: Tensor | GramFolds, config: LayerConfig | None = None) -> QuantizedLayer:
    r"""Quantize a linear layer for the inputs it sees.

    $$ \min_{\hat W} \operatorname{tr}\,(W - \hat W)\,\Sigma\,(W - \hat W)^\top \quad\text{with every } \hat W_{ij}
    \text{ on the grid of its row (and group)} $$

    Args:
        weight: W, shape (q, p): q output features, p inputs. Any floating dtype; the arithmetic is float32 and
            float64.
        gram: $\Sigma = X X^\top$ of the calibration inputs, shape (p, p), or the folds it was accumulated in; only
            the latter allow a choice of the shrinkage on held-out tokens.
        config: Algorithm and options; None is `LayerConfig()`.

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
    group = group_index(features, config.group_size).to(W.device)
    grid = minmax_grid(W, bits=config.bits, group=group, symmetric=config.symmetric, scale_dtype=config.storage)
    if config.algorithm != "rtn":
        raise NotImplementedError(config.algorithm)
    codes = rtn(W, grid)
    return _package(W, gram, config, grid, codes, None, Shrinkage(), time.perf_counter() - start)


def _package(
    W: Tensor,
    gram: Tensor | GramFolds,
    config: LayerConfig,
    grid: Grid,
    codes: Tensor,
    outliers: Outliers | None,
    shrinkage: Shrinkage,
    seconds: float,
) -> QuantizedLayer:
    sigma = gram.total if isinstance(gram, GramFolds) else gram
    approximation = grid.dequantize(codes)
    report = LayerReport(
        algorithm=config.algorithm,
        bits_per_weight=bits_per_weight(grid, config.bits, config.symmetric, config.storage, outliers),
        calibration_error=relative_error(W, approximation, sigma),
        heldout_error=None,
        shrinkage=shrinkage,
        objective=relative_error(W, approximation, shrinkage(sigma)),
        trace=(),
        cw_minimum=None,
        row_gaps=None,
        tokens=gram.tokens if isinstance(gram, GramFolds) else None,
        seconds=seconds,
    )
    return QuantizedLayer(
        codes,
        grid.scale.to(config.storage),
        grid.zero.to(torch.uint8),
        grid.group,
        config.bits,
        config.symmetric,
        outliers,
        report,
    )
