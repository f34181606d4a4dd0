"""The default: several starts, the best of them per row, sparse descent, scale refit, certificate."""

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
    entries = baselines(problem, config)
    base = entries["gptq clip" if config.clips else "gptq minmax"]
    grid, options = base.grid, {"relax": config.relax, "sweeps": 9 if config.sweeps is None else config.sweeps}
    relaxed = (("paper", problem.weight), ("gptq, paper", grid.dequantize(base.codes))) if config.thorough else ()
    for name, start in relaxed:
        codes, _ = relaxed_descent(problem, grid, start, keep_best=True, block=config.block, **options)
        entries[name] = descend(problem, problem.unevaluated(codes, grid), exact=False)
    entries["gptq, descent"] = descend(problem, base, exact=False)
    trace = [(name, entry.total / problem.scale) for name, entry in entries.items()]
    best, starts = _best_of(entries)
    best = descend(problem, best)
    trace.append(("best per row, descent", best.total / problem.scale))
    for round_ in range(config.refits):
        grid = refit_scales(problem, best, storage=config.storage)
        refitted = descend(problem, problem.unevaluated(best.codes, grid))
        best = best.best_rows(refitted)
        trace.append((f"refit {round_}", best.total / problem.scale))
    return Solution(best, certify(problem, best), starts, tuple(trace))


def _best_of(entries: dict[str, Candidate]) -> tuple[Candidate, dict[str, int]]:
    winner = torch.stack([entry.objective for entry in entries.values()]).argmin(0)  # (q,)
    counts = torch.bincount(winner, minlength=len(entries)).tolist()
    first, *others = entries.values()
    best = first
    for entry in others:
        best = best.best_rows(entry)
    return best, {name: count for name, count in zip(entries, counts, strict=True) if count}
