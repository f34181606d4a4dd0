"""The choice of the shrinkage on calibration tokens that were held out."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantease.algorithms.descent import sparse_sweeps
from quantease.algorithms.gptq import gptq
from quantease.problem.clip import clip_grid
from quantease.problem.config import LayerConfig
from quantease.problem.gram import GramFolds, Shrinkage, Target, oas
from quantease.problem.grid import Grid, group_index, minmax_grid
from quantease.problem.objective import row_objective
from quantease.problem.problem import Candidate, Problem

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
"""The ladder of strengths that is climbed for each target."""

_FIRST = 3  # the rung where the climb starts
_ROWS = 256


@dataclass(frozen=True)
class HeldOut:
    """A choice by cross-validated errors.

    Attributes:
        shrinkage: The best.
        clip: Whether the clip grid was better than the min/max grid at that shrinkage (or was asked for).
        error: Its relative error on held-out tokens, over all folds; None where nothing was held out.
        errors: The relative error of everything that was tried.
    """

    shrinkage: Shrinkage
    clip: bool
    error: float | None = None
    errors: dict[tuple[Shrinkage, bool], float] = field(default_factory=dict)


def make_grid(weight: Tensor, energy: Tensor, config: LayerConfig, *, clip: bool, mask: Tensor | None = None) -> Grid:
    r"""The grid a configuration asks for.

    Args:
        weight: W, shape (q, p).
        energy: Diagonal of $\Sigma$, shape (p,).
        config: Bits, groups, symmetry and storage.
        clip: Clip grid or min/max grid.
        mask: Positions left out (outliers), shape (q, p), bool.

    Returns:
        Scales and zero points.
    """
    group = group_index(weight.shape[1], config.group_size).to(weight.device)
    options = {"bits": config.bits, "group": group, "symmetric": config.symmetric, "scale_dtype": config.storage}
    if clip:
        return clip_grid(weight, energy, mask=mask, **options)  # type: ignore[arg-type]
    return minmax_grid(weight, mask=mask, **options)  # type: ignore[arg-type]


def choose_shrinkage(weight: Tensor, gram: GramFolds, config: LayerConfig) -> HeldOut:
    """Quantize a sample of rows on all folds but one, measure on the one, for every fold; least error wins.

    For either target the strengths are climbed from 0.1 in the direction in which the error falls. A trial is GPTQ
    followed by sparse descent on up to 256 rows, spread evenly; it costs mostly one Cholesky factorisation per fold.

    Args:
        weight: W, shape (q, p), float32.
        gram: Folds; with fewer than two that have tokens the answer is the closed form `oas`.
        config: Grid and GPTQ options.

    Returns:
        The best shrinkage and the errors.
    """
    folds = [f for f, count in enumerate(gram.counts.tolist()) if count]
    if len(folds) < 2:
        return HeldOut(oas(gram), config.clips)
    index = torch.linspace(0, weight.shape[0] - 1, min(weight.shape[0], _ROWS)).round().long().unique()
    W, total = weight[index], gram.total
    size = float(row_objective(W, total).sum()) or 1.0
    grids = {clip: make_grid(W, total.diagonal(), config, clip=clip) for clip in (False, True)}

    @functools.cache
    def error(shrinkage: Shrinkage, clip: bool) -> float:
        grid = grids[clip]
        trials = (_trial(W, shrinkage(total - gram.folds[f]), gram.folds[f], grid, config) for f in folds)
        tried[shrinkage, clip] = sum(trials) / size
        return tried[shrinkage, clip]

    tried: dict[tuple[Shrinkage, bool], float] = {}
    error(Shrinkage(0.0), config.clips)
    targets: tuple[Target, ...] = ("diagonal", "identity")
    for target in targets:
        _climb(lambda rung, target=target: error(Shrinkage(STRENGTHS[rung], target), config.clips))  # type: ignore[misc]
    if config.grid == "auto":
        error(min(tried, key=tried.__getitem__)[0], not config.clips)
    best = min(tried, key=tried.__getitem__)
    return HeldOut(*best, tried[best], tried)


def _climb(error: Callable[[int], float]) -> None:
    """Evaluate rungs from `_FIRST` in the direction of falling error until it rises."""
    for step in (1, -1):
        rung = _FIRST
        while 0 <= rung + step < len(STRENGTHS) and error(rung + step) < error(rung):
            rung += step
        if rung != _FIRST:
            return


def _trial(W: Tensor, train: Tensor, heldout: Tensor, grid: Grid, config: LayerConfig) -> float:
    problem = Problem.scaled(W, train)
    codes = gptq(problem, grid, damping=config.damping, act_order=config.act_order)
    start = Candidate(codes, grid, torch.empty(0))
    codes = sparse_sweeps(W, problem.sigma, start, None, max_sweeps=8)
    residual = W - grid.dequantize(codes)
    return float(((residual @ heldout.to(W.dtype)).double() * residual).sum())
