"""The demo: a marketplace from nothing to a certified allocation and a picture."""

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from core_tensor.app import figures
from core_tensor.app.runs import RunFolder

from polytope_lp.matching.generate import Marketplace
from polytope_lp.plots import EXTRA, picture
from polytope_lp.runs.folders import HISTORY, Source, verify_folder, write_marketplace, write_solution
from polytope_lp.solve import solve
from polytope_lp.tables.tables import read_problem


def run(sources: int, tol: float, seed: int, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Generate, solve, write, verify and draw.

    Args:
        sources: Number of sources.
        tol: Certified relative gap at which to stop.
        seed: Seed of the marketplace.
        out: Folder to write.
        overwrite: Whether what another demo wrote there is replaced.

    Returns:
        Headline figures and the files.
    """
    drawn, started = out / "convergence.png", time.monotonic()
    figures.check(drawn, EXTRA)  # before anything is computed
    market = Marketplace(sources=sources, seed=seed)
    with RunFolder.claim(out, "polytope-lp demo", {"market": market, "tol": tol}, overwrite=overwrite) as folder:
        if folder.result is not None:
            return folder.result
        problem_folder, solution_folder = out / "problem", out / "solution"
        edges = write_marketplace(market, problem_folder, resume=True)
        problem = read_problem(problem_folder)
        solution = solve(problem, tol)
        write_solution(solution, solution_folder, Source.of(problem_folder))
        checked = verify_folder(solution_folder)
        history = pa.Table.from_pylist(solution.history, HISTORY)
        picture(history, solution.prices(), drawn, f"{edges:,} edges, gap {solution.gap:.1e}")
        result = {
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
            "seconds_total": round(time.monotonic() - started, 2),
            "budgets_binding": int((solution.lam > 0).sum()),
            "allocation": str(solution_folder / "primal.arrow"),
            "prices": str(solution_folder / "prices.parquet"),
            "picture": str(drawn),
        }
        folder.finish(result)
        return result
