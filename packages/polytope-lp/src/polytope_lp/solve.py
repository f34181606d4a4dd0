"""`solve`: from a problem to a solution with certified bounds."""

import dataclasses
from collections.abc import Callable
from typing import Any, overload

from polytope_lp.general.block_lp import BlockLP
from polytope_lp.general.block_solution import BlockSolution, solve_blocks
from polytope_lp.matching import continuation
from polytope_lp.matching.evaluation import FusedDual
from polytope_lp.matching.options import Options
from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.matching.search import Search
from polytope_lp.matching.solution import Solution
from polytope_lp.matching.statistics import presolve
from polytope_lp.runs import checkpoint

Report = Callable[[dict[str, Any]], None]


@overload
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
) -> Solution: ...


@overload
def solve(
    problem: BlockLP,
    tol: float = 1e-4,
    time_limit: float | None = None,
    *,
    report: Report | None = None,
    engine: str = "auto",
) -> BlockSolution: ...


def solve(
    problem: MatchingProblem | BlockLP,
    tol: float = 1e-4,
    time_limit: float | None = None,
    *,
    group: Any = None,
    report: Report | None = None,
    warm_start: Any = None,
    options: Options | None = None,
    engine: str = "auto",
    **changes: Any,
) -> Solution | BlockSolution:
    r"""Solve $\min c'x$ subject to $A x \le b$, $x_i \in C_i$, to a certified relative gap.

    The policy: L-BFGS on the smoothed dual, with a ridge that falls until its measured cost fits `tol`; where vertices
    stop appearing as it falls (ties) or it reaches the floor of float64, the proximal loop with the ridge held.

    Args:
        problem: The problem, or with `group` this rank's shard of it; or a `BlockLP`, which `block_solution` solves by
            second-order steps or HiGHS (it takes `tol`, `time_limit`, `report` and `engine` only).
        tol: Relative gap between upper and lower bound at which to stop.
        time_limit: Seconds after which the best point so far is returned.
        group: `torch.distributed` process group whose ranks hold the shards.
        report: Called with every entry of the history.
        warm_start: Multipliers of an earlier solution, shape (rows,), float64.
        engine: For a `BlockLP`: `newton`, `highs` (where every block is a box), or `auto`.
        options: All options at once; `tol` and `time_limit` are then taken from it.
        **changes: Further fields of `Options`.

    Returns:
        The solution; read `status` before using it.

    Raises:
        TypeError: If the problem is neither, or an option does not apply to a `BlockLP`.
    """
    if isinstance(problem, BlockLP):
        foreign = {"group": group, "warm_start": warm_start, "options": options} | changes
        given = [name for name, value in foreign.items() if value is not None]
        if given:
            raise TypeError(f"{given[0]}: expected tol, time_limit, report and engine only, for a BlockLP")
        return solve_blocks(problem, tol, time_limit, report, engine)
    if engine != "auto":
        raise TypeError("engine: expected auto for a MatchingProblem, whose optimizer is chosen by method")
    if not isinstance(problem, MatchingProblem):
        raise TypeError(f"problem: expected a MatchingProblem or a BlockLP, got {type(problem).__name__}")
    chosen = options or Options(tol=tol, time_limit=time_limit)
    chosen = dataclasses.replace(chosen, **changes)
    presolved = presolve(problem, group)
    dual = FusedDual(presolved.problem, group, presolved.statistics)
    search = Search(dual, chosen, report)
    stage = checkpoint.load(chosen.checkpoint, search, problem) if chosen.checkpoint else None
    if stage is None and warm_start is not None:
        stage = continuation.warm(search, warm_start)
    saver = checkpoint.Saver(chosen, search, problem)
    status = continuation.run(search, stage, saver)
    return Solution.from_search(problem, presolved, search, status, group)
