"""Published optima: MovieLens matching and 40 Netlib LPs as blocks of boxes. Writes results/real_data.json.

python packages/polytope-lp/reproduce/real_data.py
"""

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core_tensor.app.files import read_json, write_json
from core_tensor.dev.testing import shared_data
from polytope_lp import BlockLP, MatchingProblem, box_cut, solve

RESULTS = Path(__file__).parent / "results"
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
    found = []
    for path in sorted(shared_data("netlib_lp", "AFIRO.npz").parent.glob("*.npz")):
        if names and path.stem not in names:
            continue
        with np.load(path, allow_pickle=True) as file:
            z = {name: file[name] for name in file.files}
        n, bounds, given = z["c"].size, np.squeeze(z["bounds"]), {}
        for side in ("ub", "eq"):
            if z[f"b_{side}"].size:
                given[f"A_{side}"] = z[f"A_{side}"].astype(float).reshape(-1, n)
                given[f"b_{side}"] = z[f"b_{side}"].astype(float).ravel()
        started = time.process_time()
        bound = bounds.tolist() if bounds.ndim == 2 else None
        result = solve(BlockLP.build(z["c"].astype(float), **given, bounds=bound), 1e-7)
        seconds, optimum = time.process_time() - started, float(z["obj"])
        error = abs(result.objective - optimum) / max(1.0, abs(optimum))
        found.append(
            {
                "name": path.stem,
                "rows": sum(given[f"b_{side}"].size for side in ("ub", "eq") if f"b_{side}" in given),
                "columns": n,
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="+", default=[])
    again = parser.parse_args().again
    torch.set_num_threads(1)
    path = RESULTS / "real_data.json"
    old = read_json(path) if again else {"netlib": [], "movielens": movielens()}
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
