"""Several processes under `torchrun`: who holds which blocks, and one solution of all of them at the end.

    torchrun --nproc-per-node 2 -m polytope_lp solve problem/ -o out/

Each rank maps or reads the problem and keeps a contiguous run of its chunks; an evaluation takes one allreduce. Every
rank checkpoints its own state: after a failure, the same command with `--resume` goes on from it.
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.matching.solution import Solution


@contextmanager
def ranks(problem: MatchingProblem) -> Iterator[tuple[MatchingProblem, Any, bool]]:
    """Join the processes that `torchrun` started, if it did.

    Args:
        problem: The whole problem.

    Yields:
        This rank's shard (the problem itself alone), the process group (None alone), and whether this rank reports.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield problem, None, True
        return
    rank = int(os.environ["RANK"])
    shard = problem.shard(rank, world_size)
    torch.distributed.init_process_group("gloo")
    try:
        yield shard, torch.distributed.group.WORLD, rank == 0
    finally:
        torch.distributed.destroy_process_group()


def whole(solution: Solution, problem: MatchingProblem, group: Any) -> Solution:
    """The solution of all shards as one, on rank 0: its primal follows from the multipliers, and is not gathered.

    Args:
        solution: This rank's solution.
        problem: The whole problem.
        group: Process group of the shards, or None.

    Returns:
        On rank 0 the solution of the whole problem; on others what came in.
    """
    if group is None:
        return solution
    first = torch.distributed.get_rank(group) == 0
    anchor = solution.anchor
    if anchor is not None:  # the proximal centre is the one thing that multipliers do not determine
        parts: list[Any] | None = [None] * torch.distributed.get_world_size(group) if first else None
        torch.distributed.gather_object(anchor, parts, group=group)
        anchor = torch.cat(parts) if parts is not None else anchor
    return dataclasses.replace(solution, problem=problem, anchor=anchor) if first else solution
