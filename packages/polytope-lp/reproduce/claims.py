"""The paper's qualitative claims at a size of a minute or two. Writes claims.json and claims.png.

    python packages/polytope-lp/reproduce/claims.py [--sources 100000] [--quick]

Vertex share rises as gamma falls; the corral against a QP over gamma; adaptive gamma against fixed ones and blind
decay; the optimisers against one another. Times are CPU seconds of one thread on the machine that ran it.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from _options import options, parser
from core_tensor.app.figures import pyplot
from core_tensor.app.files import atomic_path, write_json
from polytope_lp import Assignment, Marketplace, MatchingProblem, Solution, generate, solve
from polytope_lp.matching.evaluation import FusedDual
from polytope_lp.polytopes import corral
from polytope_lp.polytopes.rows import project_rows

GAMMAS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def vertex_share(sources: int) -> list[dict[str, Any]]:
    """Share of blocks at a vertex at the optimal prices, by kind of marketplace and gamma."""
    rows = []
    for kind in ("uncorrelated", "counts", "tied"):
        problem = generate(Marketplace(sources=sources, kind=kind))
        lam, dual = solve(problem, 1e-4).lam, FusedDual(problem)
        shares = [1.0 - dual.evaluate(lam, gamma).fractional / problem.data.blocks for gamma in GAMMAS]
        rows.append(
            {"kind": kind, **{f"gamma_{gamma:.0e}": share for gamma, share in zip(GAMMAS, shares, strict=True)}}
        )
    return rows


def corral_against_qp(draws: int = 15) -> list[dict[str, Any]]:
    """Items by slots, values U(0, 1) with DCG discounts and 5 % noise: the corral against a semismooth-Newton QP."""
    rows = []
    for items, slots in ((10, 5), (20, 10)):
        kind = Assignment(slots)
        for gamma in GAMMAS[:4]:
            random, parts = np.random.default_rng(0), []
            for _ in range(draws):
                discount = 1 / np.log2(np.arange(2, slots + 2))
                value = random.random((items, 1)) * discount + 0.05 * random.random((items, slots))
                y, near = value.ravel() / gamma, (value + 1e-3 * random.normal(size=value.shape)).ravel() / gamma
                cold, seconds = _timed(corral.project, y, kind.best)
                warm = corral.project(near, kind.best, cold.vertices)
                exact, qp = _timed(project_rows, y, kind.rows(y.size))
                parts.append((len(cold.weights), cold.calls, warm.calls, seconds, qp, np.abs(cold.point - exact).max()))
            size, calls, again, seconds, qp, error = (np.array(column) for column in zip(*parts, strict=True))
            rows.append(
                {
                    "problem": f"{items} x {slots}",
                    "gamma": gamma,
                    "vertices": float(size.mean()),
                    "most_vertices": int(size.max()),
                    "one_vertex": float((size == 1).mean()),
                    "calls_cold": float(calls.mean()),
                    "calls_warm": float(again.mean()),
                    "corral_ms": float(np.median(seconds)) * 1e3,
                    "qp_ms": float(np.median(qp)) * 1e3,
                    "qp_over_corral": float(np.median(qp) / np.median(seconds)),
                    "greatest_difference": float(error.max()),
                }
            )
    return rows


def _timed(call: Any, *given: Any) -> tuple[Any, float]:
    call(*given)
    started = time.process_time()
    for _ in range(3):
        result = call(*given)
    return result, (time.process_time() - started) / 3


def blind_decay(problem: MatchingProblem, tol: float, steps: int = 35, factor: float = 0.7) -> dict[str, Any]:
    """The rewrite's rule: every 35 evaluations gamma falls by 0.7, whatever has been reached."""
    gamma, lam, used, best = 1e-1, None, 0, float("inf")
    while used < 1000:
        part = solve(problem, tol, gamma=gamma, proximal=False, warm_start=lam, evaluations=steps)
        used, lam, gamma = used + part.evaluations, part.primal_lam, gamma * factor
        best = min(best, part.gap)
        if part.status == "optimal":
            break
    return {"rule": "0.7 every 35 evaluations", "evaluations": used, "gap": best, "reached": best <= tol}


def gamma_rules(sources: int, tol: float) -> tuple[list[dict[str, Any]], dict[str, Solution]]:
    """The adaptive rule against every fixed gamma of a grid and against blind decay, all with L-BFGS."""
    problem = generate(Marketplace(sources=sources))
    options = {"proximal": False, "method": "lbfgs", "evaluations": 1000}
    runs = {"adaptive": solve(problem, tol, **options)}
    runs |= {f"fixed {gamma:.0e}": solve(problem, tol, gamma=gamma, **options) for gamma in GAMMAS}
    rows = [
        {"rule": name, "evaluations": run.evaluations, "gap": run.gap, "reached": run.status == "optimal"}
        for name, run in runs.items()
    ]
    return [*rows, blind_decay(problem, tol)], runs


def optimisers(sources: int) -> list[dict[str, Any]]:
    """Evaluations and seconds of every method, and of the policy that picks (`auto`)."""
    rows = []
    for kind in ("uncorrelated", "tied"):
        problem = generate(Marketplace(sources=sources, kind=kind))
        for tol in (1e-4, 1e-6):
            for method in ("auto", "lbfgs", "accelerated"):
                started = time.process_time()
                run = solve(problem, tol, method=method, evaluations=2000)
                rows.append(
                    {
                        "kind": kind,
                        "tol": tol,
                        "method": method,
                        "reached": run.status == "optimal",
                        "gap": run.gap,
                        "evaluations": run.evaluations,
                        "proximal": run.anchor is not None,
                        "cpu_seconds": time.process_time() - started,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def draw(shares: list[dict[str, Any]], runs: dict[str, Solution], out: Path) -> None:
    """Vertex share over gamma, and the gap of every rule over evaluations."""
    plt = pyplot("polytope-lp[plot]")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for row, colour in zip(shares, ("#2166ac", "#4d9221", "#d6604d"), strict=True):
        left.semilogx(GAMMAS, [row[f"gamma_{g:.0e}"] for g in GAMMAS], "o-", color=colour, label=row["kind"])
    left.invert_xaxis()
    left.set(xlabel="ridge γ (falling)", ylabel="share of sources at a vertex", ylim=(0, 1.02), title="Vertices")
    for name, run in runs.items():
        gaps = np.minimum.accumulate([np.inf if h["gap"] is None else h["gap"] for h in run.history])
        style = {"color": "#2166ac", "lw": 2.5} if name == "adaptive" else {"lw": 1.0, "alpha": 0.8}
        right.loglog(np.arange(1, gaps.size + 1), gaps, label=name.replace("fixed", "γ ="), **style)
    right.set(xlabel="evaluations of the dual", ylabel="certified gap", title="Adaptive and fixed ridges")
    for axes in (left, right):
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=8)
    with atomic_path(out / "claims.png") as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run everything and write the results."""
    arguments = parser(__doc__)
    arguments.add_argument("--sources", type=int, help="sources of every market [30000; 3000 with --quick]")
    given = options(arguments)
    sources = given.sources or (3000 if given.quick else 30_000)
    shares = vertex_share(sources)
    rules, runs = gamma_rules(sources, 1e-5)
    result = {
        "sources": sources,
        "vertex_share": shares,
        "corral": corral_against_qp(3 if given.quick else 15),
        "gamma_rules": rules,
        "optimisers": optimisers(sources),
    }
    write_json(given.out / "claims.json", result)
    draw(shares, runs, given.out)


if __name__ == "__main__":
    main()
