"""Certificates put to the test: random markets judged in exact arithmetic, units that must not matter, and Netlib.

python packages/polytope-lp/benchmarks/campaign.py --first-seed 123456 --markets 2000   other markets than the bench's
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from core_tensor.dev.testing import shared_data
from polytope_lp import BlockLP, Marketplace, MatchingProblem, generate, solve

TESTS = Path(__file__).parents[1] / "tests"
FACTORS = (1e-12, 1e-9, 1e-6, 1e-3, 1e3, 1e6, 1e9, 1e12)
SMALLER_FACTORS = (1e-6, 1e-3, 1e3, 1e6)


def of_tests(name: str) -> Any:
    """A module that the tests share with the benchmarks."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def claims(quick: bool) -> dict[str, Any]:
    """The markets of the first seeds."""
    return judged_claims(range(200 if quick else 2000))


def judged_claims(seeds: range) -> dict[str, Any]:
    """Solve random markets, half as many with equations; count what `verify` rejects and exact arithmetic denies."""
    markets = of_tests("wide_markets")
    rejected: list[int] = []
    false: list[int] = []
    unsolved: dict[str, list[int]] = {"plain": [], "equations": []}
    for seed in seeds:
        problem = markets.wide_market(seed)
        solution = solve(problem, 1e-6, time_limit=20)
        if not solution.verify()["ok"]:
            rejected.append(seed)
        if markets.false_claims(problem, solution) or (solution.status == "optimal" and solution.gap < -1e-9):
            false.append(seed)
        if solution.status not in {"optimal", "infeasible"}:
            unsolved["plain"].append(seed)
    for seed in seeds[: len(seeds) // 2]:
        solution = solve(markets.wide_market(seed, equations=True), 1e-6, time_limit=20)
        rejected += [] if solution.verify()["ok"] else [-1 - seed]
        if solution.status not in {"optimal", "infeasible", "optimal_residual"}:
            unsolved["equations"].append(seed)
    return {
        "verify_false_rejects": len(rejected),
        "false_claims": len(false),
        "claims_detail": {"markets": len(seeds), "with_equations": len(seeds) // 2, "first_seed": seeds.start}
        | {"rejected": rejected, "false": false, "unsolved": unsolved},
    }


def scale_invariance(quick: bool) -> dict[str, Any]:
    """Greatest relative change of the certified value, over tol, when units of value or of cost change."""
    tol, worst = 1e-5, 0.0
    for kind in ("uncorrelated", "counts"):
        market = generate(Marketplace(sources=500 if quick else 5000, destinations=50, kind=kind))
        d, base = market.data, solve(market, tol).objective
        a = torch.ones(d.variables, dtype=torch.float64) if d.coefficient is None else d.coefficient.double()
        for factor in FACTORS:
            other = MatchingProblem.from_arrays(
                d.offsets, d.index, -d.cost.double() * factor, a, market.budgets, allow_unused=True
            )
            worst = max(worst, abs(solve(other, tol).objective / factor - base) / abs(base))
        for factor in SMALLER_FACTORS:
            other = MatchingProblem.from_arrays(
                d.offsets, d.index, -d.cost.double(), a * factor, market.budgets * factor, allow_unused=True
            )
            worst = max(worst, abs(solve(other, tol).objective - base) / abs(base))
    return {"scale_invariance_max": worst / tol}


def netlib(quick: bool) -> dict[str, Any]:
    """Netlib LPs whose published optimum is reached, with a certificate that verifies."""
    del quick
    read_netlib, solved, missed = of_tests("netlib_files").read_netlib, 0, []
    for file in sorted(shared_data("netlib_lp", "AFIRO.npz").parent.glob("*.npz")):
        given, optimum = read_netlib(file)
        found = solve(BlockLP.build(**given), 1e-7)
        right = abs(found.objective - optimum) <= 1e-6 * max(1.0, abs(optimum))
        if found.status.startswith("optimal") and right and found.verify()["ok"]:
            solved += 1
        else:
            missed.append(file.stem)
    return {"netlib_solved": solved, "netlib_solved_detail": {"missed": missed}}


def main() -> None:
    """Judge the markets of seeds that no other run has used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-seed", type=int, required=True)
    parser.add_argument("--markets", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(judged_claims(range(given.first_seed, given.first_seed + given.markets))))


if __name__ == "__main__":
    main()
