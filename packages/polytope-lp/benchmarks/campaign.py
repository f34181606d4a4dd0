"""Certificates put to the test: random markets judged in exact arithmetic, units that must not matter, and Netlib."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core_tensor.dev.testing import shared_data
from polytope_lp import BlockLP, Marketplace, MatchingProblem, generate, solve

TESTS = Path(__file__).parents[1] / "tests"
FACTORS = (1e-12, 1e-9, 1e-6, 1e-3, 1e3, 1e6, 1e9, 1e12)
SMALLER_FACTORS = (1e-6, 1e-3, 1e3, 1e6)


def _markets() -> Any:
    spec = importlib.util.spec_from_file_location("wide_markets", TESTS / "wide_markets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def claims(quick: bool) -> dict[str, Any]:
    """Solve random markets; count what `verify` rejects and what exact arithmetic denies."""
    markets, judged = _markets(), 200 if quick else 2000
    with_equations = judged // 2
    rejected, false, statuses = [], [], {}
    for seed in range(judged):
        problem = markets.wide_market(seed)
        solution = solve(problem, 1e-6, time_limit=20)
        statuses[solution.status] = statuses.get(solution.status, 0) + 1
        if not solution.verify()["ok"]:
            rejected.append(seed)
        if markets.false_claims(problem, solution) or (solution.status == "optimal" and solution.gap < -1e-9):
            false.append(seed)
    for seed in range(with_equations):
        ok = solve(markets.wide_market(seed, equations=True), 1e-6, time_limit=20).verify()["ok"]
        rejected += [] if ok else [-1 - seed]
    return {
        "verify_false_rejects": len(rejected),
        "false_claims": len(false),
        "claims_detail": {"markets": judged, "with_equations": with_equations, "statuses": statuses}
        | {"rejected": rejected, "false": false},
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
    folder, solved, missed = shared_data("netlib_lp", "AFIRO.npz").parent, 0, []
    for file in sorted(folder.glob("*.npz")):
        with np.load(file, allow_pickle=True) as z:
            n, bounds, optimum = z["c"].size, np.squeeze(z["bounds"]), float(z["obj"])
            given: dict[str, Any] = {"c": z["c"].astype(float), "bounds": bounds.tolist() if bounds.ndim == 2 else None}
            for side in ("ub", "eq"):
                if z[f"b_{side}"].size:
                    given[f"A_{side}"] = z[f"A_{side}"].astype(float).reshape(-1, n)
                    given[f"b_{side}"] = z[f"b_{side}"].astype(float).ravel()
        found = solve(BlockLP.build(**given), 1e-7)
        right = abs(found.objective - optimum) <= 1e-6 * max(1.0, abs(optimum))
        if found.status.startswith("optimal") and right and found.verify()["ok"]:
            solved += 1
        else:
            missed.append(file.stem)
    return {"netlib_solved": solved, "netlib_solved_detail": {"missed": missed}}
