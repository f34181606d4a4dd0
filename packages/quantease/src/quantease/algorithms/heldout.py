"""The choice of the shrinkage on calibration tokens that were held out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantease.algorithms.descent import sparse_sweeps
from quantease.algorithms.gptq import gptq_with_gradient
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


def choose_shrinkage(
    weights: Tensor | Sequence[Tensor],
    gram: GramFolds,
    config: LayerConfig,
    start: tuple[Shrinkage, bool] | None = None,
) -> HeldOut:
    """Quantize a sample of rows on all folds but one, measure on the one, for every fold; least error wins.

    For either target the strengths are climbed from 0.1 in the direction in which the error falls, and the other grid
    is tried at the best; with `start`, only its neighbours on the ladder are tried, on its grid. A trial is GPTQ
    followed by sparse descent on up to 256 rows, spread evenly.

    Args:
        weights: W, shape (q, p), float32, or several matrices that read the same input and get one answer.
        gram: Folds; with fewer than two that have tokens the answer is the closed form `oas`.
        config: Grid and GPTQ options.
        start: Shrinkage and grid (True for clip) of a similar layer.

    Returns:
        The best shrinkage and the errors; with several matrices their mean.
    """
    folds = [f for f, count in enumerate(gram.counts.tolist()) if count]
    if len(folds) < 2:
        return HeldOut(oas(gram), config.clips)
    total = gram.total
    W, share = _sample([weights] if isinstance(weights, Tensor) else weights, total)
    trains = [((total - gram.folds[f]).to(W), gram.folds[f].to(W)) for f in folds]
    grids: dict[bool, Grid] = {}
    tried: dict[tuple[Shrinkage, bool], float] = {}

    def error(shrinkage: Shrinkage, clip: bool) -> float:
        if (shrinkage, clip) not in tried:
            if clip not in grids:
                grids[clip] = make_grid(W, total.diagonal(), config, clip=clip)
            problems = ((Problem.scaled(W, shrinkage(train)), unseen) for train, unseen in trains)
            tried[shrinkage, clip] = sum(_trial(p, unseen, grids[clip], share, config) for p, unseen in problems)
        return tried[shrinkage, clip]

    if start is not None and start[0].strength in STRENGTHS and (config.grid == "auto" or start[1] == config.clips):
        target, clip = start[0].target, start[1]
        rung = STRENGTHS.index(start[0].strength)
        for step in (1, -1):
            if 0 <= rung + step < len(STRENGTHS) and error(Shrinkage(STRENGTHS[rung + step], target), clip) < error(
                start[0], clip
            ):
                break
    else:
        clip = config.clips
        error(Shrinkage(0.0), clip)
        targets: tuple[Target, ...] = ("diagonal", "identity")
        for target in targets:
            _climb(lambda rung, target=target: error(Shrinkage(STRENGTHS[rung], target), clip))  # type: ignore[misc]
        if config.grid == "auto":
            error(min(tried, key=tried.__getitem__)[0], not clip)
    best = min(tried, key=tried.__getitem__)
    return HeldOut(*best, tried[best], tried)


def _sample(weights: Sequence[Tensor], sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of all matrices, spread evenly, and by what the error of each counts in the mean of relative errors."""
    rows, share = [], []
    for W in weights:
        count = max(1, min(W.shape[0], _ROWS * W.shape[0] // sum(w.shape[0] for w in weights)))
        sample = W[torch.linspace(0, W.shape[0] - 1, count).round().long().unique()]
        size = float(row_objective(sample, sigma).sum()) or 1.0
        rows.append(sample)
        share.append(torch.full((len(sample),), 1 / (size * len(weights)), dtype=torch.float64, device=W.device))
    return torch.cat(rows), torch.cat(share)


def _climb(error: Callable[[int], float]) -> None:
    """Evaluate rungs from `_FIRST` in the direction of falling error until it rises."""
    for step in (1, -1):
        rung = _FIRST
        while 0 <= rung + step < len(STRENGTHS) and error(rung + step) < error(rung):
            rung += step
        if rung != _FIRST:
            return


def _trial(problem: Problem, unseen: Tensor, grid: Grid, share: Tensor, config: LayerConfig) -> float:
    codes, gradient = gptq_with_gradient(problem, grid, damping=config.damping, act_order=config.act_order)
    start = Candidate(codes, grid, torch.empty(0))
    codes = sparse_sweeps(problem.weight, problem.sigma, start, None, max_sweeps=8, gradient=gradient)
    residual = problem.weight - grid.dequantize(codes)
    errors = torch.linalg.vecdot((residual @ unseen.to(residual)).double(), residual.double())
    return float(errors @ share)
