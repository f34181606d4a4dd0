"""How fast this machine is: nanoseconds per nonzero of one evaluation, and a solve."""

import time
from typing import Any

import torch

from polytope_lp.matching.evaluation import FusedDual
from polytope_lp.matching.generate import Marketplace, generate
from polytope_lp.solve import solve


def time_machine(market: Marketplace, tol: float, repeats: int = 7) -> dict[str, Any]:
    """Time evaluations of the dual at several ridges, and a solve.

    Args:
        market: What to generate.
        tol: Certified relative gap at which to stop.
        repeats: Evaluations per ridge; the median counts.

    Returns:
        Sizes, `ridges` (ridge, milliseconds, nanoseconds per nonzero, share of blocks at a vertex), and the solve.
    """
    problem = generate(market)
    solution = solve(problem, tol)
    dual, edges, ridges = FusedDual(problem), problem.data.variables, []
    for gamma in (1e-1, 1e-2, 1e-3, 1e-4):
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            found = dual.evaluate(solution.lam, gamma)
            times.append(time.perf_counter() - started)
        median = sorted(times)[repeats // 2]
        share = 1.0 - found.fractional / max(1, problem.data.blocks)
        ridges.append(
            {"gamma": gamma, "milliseconds": median * 1e3, "ns_per_nonzero": median * 1e9 / edges, "at_vertex": share}
        )
    return {
        "sources": problem.data.blocks,
        "edges": edges,
        "threads": torch.get_num_threads(),
        "status": solution.status,
        "gap": solution.gap,
        "evaluations": solution.evaluations,
        "solve_seconds": solution.seconds,
        "ridges": ridges,
    }
