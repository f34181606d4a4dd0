"""Several processes under `torchrun`: one solution of all of them at the end.

    torchrun --nproc-per-node 2 -m polytope_lp solve problem/ -o out/

Each rank maps or reads the problem and keeps a contiguous run of its chunks; an evaluation takes one allreduce. Every
rank checkpoints its own state: after a failure the same command resumes from it.
"""

import dataclasses

import torch
from core_tensor.app.ranks import Ranks

from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.matching.solution import Solution
from polytope_lp.matching.statistics import presolve


def solution_of_all(solution: Solution, problem: MatchingProblem, ranks: Ranks) -> Solution:
    """The solution of all shards as one, on rank 0: its primal follows from the multipliers, and is not gathered.

    Args:
        solution: This rank's solution.
        problem: The problem of all ranks.
        ranks: The processes.

    Returns:
        On rank 0 the solution of all; on others what came in.
    """
    if ranks.size == 1:
        return solution
    anchor = solution.anchor
    if anchor is not None:  # the proximal center is the one thing that multipliers do not determine
        parts = ranks.gather(anchor)
        anchor = torch.cat(parts) if ranks.first else anchor
    if not ranks.first:
        return solution
    return dataclasses.replace(solution, problem=problem, anchor=anchor, presolved=presolve(problem))
