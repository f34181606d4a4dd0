"""Published optima: MovieLens matching and 40 Netlib LPs as blocks of boxes. Writes real_data.json.

python packages/polytope-lp/reproduce/real_data.py [--quick]
"""

import csv
import time
from typing import Any

import numpy as np
from _options import options, parser
from campaign import of_tests
from core_tensor.app.files import read_json, write_json
from core_tensor.dev.testing import shared_data
from polytope_lp import BlockLP, MatchingProblem, box_cut, solve

OPTIMA = ((1, None, 3502.0), (5, 0.1, 17244.5))


def movielens() -> list[dict[str, Any]]:
    """Both instances to a certified 1e-5."""
    with shared_data("movielens_latest_small", "ratings.csv").open() as file:
        rows = sorted((int(r["userId"]), int(r["movieId"]), float(r["rating"])) for r in csv.DictReader(file))
    user, movie, rating = (np.array(column) for column in zip(*rows, strict=True))
    _, source = np.unique(user, return_inverse=True)
    _, destination, counts = np.unique(movie, return_inverse=True, return_counts=True)
    offsets, found = np.searchsorted(source, np.arange(source.max() + 2)), []
    for K, share, optimum in OPTIMA:
        budgets = np.ones(counts.size) if share is None else np.maximum(1.0, np.floor(share * counts))
        problem = MatchingProblem.from_arrays(offsets, destination, rating, None, budgets, box_cut(float(K), 1.0))
        started = time.process_time()
        solution = solve(problem, 1e-5)
        best = solution.rounded("exact")
        found.append(
            {
                "K": K,
                "optimum": optimum,
                "value": -solution.objective,
                "at_most": -solution.lower_bound,
                "gap": solution.gap,
                "error": abs(-solution.objective - optimum) / optimum,
                "verified": solution.verify()["ok"],
                "whole_value": solution.rounded().value,
                "best_whole": best.value,
                "proved": best.proved,
                "evaluations": solution.evaluations,
                "cpu_seconds": time.process_time() - started,
            }
        )
    return found


def netlib(names: list[str]) -> list[dict[str, Any]]:
    """Every LP (or those named): what was reached, and what was claimed."""
    found, read_netlib = [], of_tests("netlib_files").read_netlib
    for path in sorted(shared_data("netlib_lp", "AFIRO.npz").parent.glob("*.npz")):
        if names and path.stem not in names:
            continue
        given, optimum = read_netlib(path)
        started = time.process_time()
        result = solve(BlockLP.build(**given), 1e-7)
        seconds = time.process_time() - started
        error = abs(result.objective - optimum) / max(1.0, abs(optimum))
        found.append(
            {
                "name": path.stem,
                "rows": sum(given[f"b_{side}"].size for side in ("ub", "eq") if f"b_{side}" in given),
                "columns": given["c"].size,
                "reached": bool(error <= 1e-6),
                "claimed": result.status in {"optimal", "optimal_residual"},
                "verified": result.verify()["ok"],
                "engine": result.engine,
                "error": error,
                "violation": result.max_violation,
                "steps": result.iterations,
                "cpu_seconds": seconds,
            }
        )
        print(found[-1], flush=True)
    return found


def main() -> None:
    """Run both and write the results."""
    arguments = parser(__doc__)
    arguments.add_argument("--again", nargs="+", default=[], help="problems to run anew; the others stay as they are")
    given = options(arguments)
    again = given.again or (["AFIRO", "BLEND", "KB2", "SC50A"] if given.quick else [])
    path = given.out / "real_data.json"
    old = read_json(path) if given.again else {"netlib": [], "movielens": movielens()}
    if "movielens" in again:
        old["movielens"] = movielens()
    fresh = {lp["name"]: lp for lp in netlib(again)}
    lps = [fresh.pop(lp["name"], lp) for lp in old["netlib"]] + list(fresh.values())
    summary = {
        "problems": len(lps),
        "solved": sum(lp["reached"] and lp["claimed"] and lp["verified"] for lp in lps),
        "false_claims": sum(lp["claimed"] and not lp["reached"] for lp in lps),
        "reached_unclaimed": sum(lp["reached"] and not lp["claimed"] for lp in lps),
        "missed": ", ".join(lp["name"] for lp in lps if not (lp["reached"] and lp["claimed"])) or "none",
    }
    write_json(path, {"movielens": old["movielens"], "netlib": lps, "netlib_summary": summary})


if __name__ == "__main__":
    main()
