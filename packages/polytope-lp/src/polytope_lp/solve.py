"""`solve`: from a problem to a solution with certified bounds."""

import dataclasses
from collections.abc import Callable
from typing import Any

from polytope_lp import checkpoint, continuation
from polytope_lp.evaluation import FusedDual
from polytope_lp.options import Options
from polytope_lp.problem import MatchingProblem
from polytope_lp.search import Search
from polytope_lp.solution import Solution

Report = Callable[[dict[str, Any]], None]


def solve(
    problem: MatchingProblem,
    tol: float = 1e-4,
    time_limit: float | None = None,
    *,
    group: Any = None,
    report: Report | None = None,
    warm_start: Any = None,
    options: Options | None = None,
    **changes: Any,
) -> Solution:
    r"""Solve $\min c'x$ subject to $A x \le b$, $x_i \in C_i$, to a certified relative gap.

    The policy: L-BFGS on the smoothed dual, with a ridge that falls until its measured cost fits `tol`; where vertices
    stop appearing as it falls (ties) or it reaches the floor of float64, the proximal loop with the ridge held.

    Args:
        problem: The problem, or with `group` this rank's shard of it.
        tol: Relative gap between upper and lower bound at which to stop.
        time_limit: Seconds after which the best point so far is returned.
        group: `torch.distributed` process group whose ranks hold the shards.
        report: Called with every entry of the history.
        warm_start: Multipliers of an earlier solution, shape (rows,), float64.
        options: All options at once; `tol` and `time_limit` then stand in it.
        **changes: Further fields of `Options`.

    Returns:
        The solution; read `status` before using it.
    """
    chosen = options or Options(tol=tol, time_limit=time_limit)
    chosen = dataclasses.replace(chosen, **changes)
    dual = FusedDual(problem, group)
    search = Search(dual, chosen, report)
    stage = checkpoint.load(chosen.checkpoint, search, problem) if chosen.checkpoint else None
    if stage is None and warm_start is not None:
        stage = continuation.warm(search, warm_start)
    saver = checkpoint.Saver(chosen, search, problem)
    status = continuation.run(search, stage, saver)
    return Solution.from_search(problem, search, status, group)
