r"""Many small problems in one call: solved side by side, certified one by one.

A small problem's time is fixed costs: Python's, scipy's, those of an optimizer's first steps. HiGHS takes a stack of
problems as one block-diagonal LP, each in its own unit of value; its points are then evaluated by the dual of each
problem, whose bounds are what is claimed. Problems that are larger, or whose point does not certify the gap, go to
`solve`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from polytope_lp.matching.evaluation import FusedDual
from polytope_lp.matching.exact import evaluate_at, points_together
from polytope_lp.matching.options import Options
from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.matching.search import FinishedError, Search
from polytope_lp.matching.solution import Solution
from polytope_lp.matching.statistics import Presolved, presolve
from polytope_lp.solve import solve

SMALL, STACK = 2000, 8000
"""Variables of a problem, and of a stack of them, up to which HiGHS takes less time than dual ascent."""


def solve_many(problems: Sequence[MatchingProblem], tol: float = 1e-4, **changes: Any) -> list[Solution]:
    """Solve many small problems, such as one per market, per hour, or per weight of a trade-off.

    Every solution is what `solve` gives: prices, bounds, a gap within `tol` and a `verify()` of its own. Its certified
    values are those of a single call within the two gaps; where an optimum is not unique, the allocation may differ.

    Args:
        problems: The problems, of any sizes and kinds.
        tol: Relative gap of each.
        **changes: Further fields of `Options`, but no `checkpoint`. A `method` other than `auto`, or a `gamma`, is left
            to `solve`.

    Returns:
        Solutions in the order of the problems.

    Raises:
        TypeError: If something else than a `MatchingProblem` is among them.
        ValueError: If a checkpoint is asked for.
    """
    options = dataclasses.replace(Options(tol=tol), **changes)
    if options.checkpoint is not None:
        raise ValueError("checkpoint: expected none for many problems")
    wrong = next((type(p).__name__ for p in problems if not isinstance(p, MatchingProblem)), None)
    if wrong is not None:
        raise TypeError(f"problems: expected MatchingProblems only, got {wrong}")
    solutions: dict[int, Solution] = {}
    plain = options.method == "auto" and options.gamma is None and options.proximal is None
    small = [at for at, p in enumerate(problems) if plain and p.data.variables <= SMALL and not p.sharded]
    for stack in _stacks(problems, small):
        solutions |= _solve_stack({at: problems[at] for at in stack}, options)
    return [solutions.get(at) or solve(problem, options=options) for at, problem in enumerate(problems)]


def _stacks(problems: Sequence[MatchingProblem], members: list[int]) -> Iterator[list[int]]:
    """Runs of problems of at most `STACK` variables together."""
    stack: list[int] = []
    total = 0
    for at in members:
        size = problems[at].data.variables
        if stack and total + size > STACK:
            yield stack
            stack, total = [], 0
        stack.append(at)
        total += size
    if stack:
        yield stack


def _solve_stack(problems: dict[int, MatchingProblem], options: Options) -> dict[int, Solution]:
    """The solutions of those problems of a stack whose points certify the gap."""
    presolved = {at: presolve(problem) for at, problem in problems.items()}
    work, units = ([p.problem for p in presolved.values()], [p.statistics.unit or 1.0 for p in presolved.values()])
    points = points_together(work, units)
    if points is None:
        return {}
    found = {}
    for (at, problem), (x, lam) in zip(problems.items(), points, strict=True):
        solution = _certified(problem, presolved[at], x, lam, options)
        if solution is not None:
            found[at] = solution
    return found


def _certified(problem: MatchingProblem, presolved: Presolved, x: Any, lam: Any, options: Options) -> Solution | None:
    search = Search(FusedDual(presolved.problem, None, presolved.statistics), options)
    try:
        evaluate_at(search, x, lam)
    except FinishedError as finished:
        if finished.args[0] == "optimal":
            return Solution.from_search(problem, presolved, search, "optimal")
    return None
