"""The demo: a marketplace from nothing to a certified allocation and a picture."""

import shutil
from pathlib import Path
from typing import Any

from polytope_lp.matching.generate import Marketplace
from polytope_lp.plots import picture
from polytope_lp.runs.folders import verify_folder, write_marketplace, write_solution
from polytope_lp.solve import solve
from polytope_lp.tables.tables import read_problem


def run(sources: int, tol: float, out: Path) -> dict[str, Any]:
    """Generate, solve, write, verify and draw.

    Args:
        sources: Number of sources.
        tol: Certified relative gap at which to stop.
        out: Folder to write; `problem/` and `solution/` in it are replaced.

    Returns:
        Headline figures and the files.
    """
    problem_folder, solution_folder = out / "problem", out / "solution"
    for folder in (problem_folder, solution_folder):
        if folder.exists():
            shutil.rmtree(folder)
    edges = write_marketplace(Marketplace(sources=sources), problem_folder)
    problem = read_problem(problem_folder)
    solution = solve(problem, tol)
    write_solution(solution, solution_folder, problem_folder, None, {"polytope": None})
    checked = verify_folder(solution_folder)
    drawn = picture(solution, out / "convergence.png")
    return {
        "status": solution.status,
        "verified": checked["ok"],
        "sources": problem.data.blocks,
        "edges": edges,
        "destinations": problem.rows,
        "value": -solution.objective,
        "value_at_most": -solution.lower_bound,
        "gap": solution.gap,
        "max_violation": solution.max_violation,
        "evaluations": solution.evaluations,
        "solve_seconds": solution.seconds,
        "budgets_binding": int((solution.lam > 0).sum()),
        "allocation": str(solution_folder / "primal.arrow"),
        "prices": str(solution_folder / "prices.parquet"),
        "picture": str(drawn),
    }
