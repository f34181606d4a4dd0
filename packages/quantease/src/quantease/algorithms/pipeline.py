"""The default: several starts, the best of them per row, sparse descent, scale refit, certificate."""

from collections.abc import Iterable
from functools import reduce

import torch

from quantease.algorithms.descent import certify, descend
from quantease.algorithms.gptq import gptq
from quantease.algorithms.heldout import make_grid
from quantease.algorithms.refit import refit_scales
from quantease.algorithms.relaxed import relaxed_descent
from quantease.algorithms.rtn import rtn
from quantease.problem.config import LayerConfig
from quantease.problem.problem import Candidate, Problem, Solution


def baselines(problem: Problem, config: LayerConfig) -> dict[str, Candidate]:
    """RTN and GPTQ on both grids, the solutions that the default may not be worse than in any row.

    Args:
        problem: Weights and (shrunken) Gram matrix.
        config: Grid and GPTQ options.

    Returns:
        Candidates by name.
    """
    found = {}
    for name, clip in (("minmax", False), ("clip", True)):
        grid = make_grid(problem.weight, problem.energy, config, clip=clip)
        found[f"rtn {name}"] = problem.candidate(rtn(problem.weight, grid), grid)
        codes = gptq(problem, grid, damping=config.damping, act_order=config.act_order)
        found[f"gptq {name}"] = problem.candidate(codes, grid)
    return found


def quantease(problem: Problem, config: LayerConfig) -> Solution:
    """Quantize all rows of a problem.

    1. Baselines: RTN and GPTQ on the min/max and the clip grid.
    2. Starts on the configured grid, each brought down by sparse descent: GPTQ; with `thorough` also the paper's
       schedule from W and from GPTQ, both keeping the best iterate of each row.
    3. The best of all per row, descended to a coordinate-wise minimum in float64.
    4. `refits` times: closed-form scales for these codes, descent, kept where better.

    Args:
        problem: Weights and (shrunken) Gram matrix.
        config: Options.

    Returns:
        The solution: in no row worse than a baseline, under the problem's Gram matrix in float64, as exported.
    """
    simple = baselines(problem, config)
    base = simple["gptq clip" if config.clips else "gptq minmax"]
    grid, options = base.grid, {"relax": config.relax, "sweeps": 9 if config.sweeps is None else config.sweeps}
    descended = {}
    relaxed = (("paper", problem.weight), ("gptq, paper", grid.dequantize(base.codes))) if config.thorough else ()
    for name, start in relaxed:
        codes, _ = relaxed_descent(problem, grid, start, keep_best=True, block=config.block, **options)
        descended[name] = descend(problem, problem.unevaluated(codes, grid))
    descended["gptq, descent"] = descend(problem, base)
    entries = simple | descended
    trace = [(name, entry.total / problem.scale) for name, entry in entries.items()]

    # rows in which a baseline is best have no descent behind them yet
    best, ahead = _best(descended.values()), _best(simple.values())
    rows = (ahead.objective < best.objective).nonzero()[:, 0]
    best = best.with_rows(rows, descend(problem.rows(rows), ahead.rows(rows)))
    trace.append(("best per row, descent", best.total / problem.scale))

    # a row whose stored scale stays is at its minimum, and after a round without gain so is every later one
    rows = torch.arange(len(problem.weight), device=rows.device)
    for round_ in range(config.refits):
        part, before = problem.rows(rows), best.rows(rows)
        grid = refit_scales(part, before, storage=config.storage)
        moved = (grid.scale != before.grid.scale).any(1).nonzero()[:, 0]
        rows, part, before = rows[moved], part.rows(moved), before.rows(moved)
        after = before.best_rows(descend(part, part.unevaluated(before.codes, grid.rows(moved))))
        best = best.with_rows(rows, after)
        rows = rows[after.objective < before.objective]
        trace.append((f"refit {round_}", best.total / problem.scale))
    return Solution(best, certify(problem, best), _wins(entries), tuple(trace))


def _best(entries: Iterable[Candidate]) -> Candidate:
    return reduce(Candidate.best_rows, entries)


def _wins(entries: dict[str, Candidate]) -> dict[str, int]:
    winner = torch.stack([entry.objective for entry in entries.values()]).argmin(0)  # (q,)
    counts = torch.bincount(winner, minlength=len(entries)).tolist()
    return {name: count for name, count in zip(entries, counts, strict=True) if count}
