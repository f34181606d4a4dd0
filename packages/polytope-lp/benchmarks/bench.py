"""Benchmarks of polytope-lp against a bucketed torch path, OR-tools PDLP and Clarabel, and against the memory's rate.

Ratios are CPU time of one thread, in interleaved pairs. PDLP's tolerance is on norms over all rows, which lets single
budgets be exceeded by per cents; so both sides are held to the same gap after a repair that keeps every budget, and
PDLP is given the loosest tolerance of 1, 0.1, 0.01 times the target that reaches it.
"""

import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import campaign
import numpy as np
import torch
import torch.distributed as dist
from core_tensor import project_blocks
from core_tensor.dev.benchmarking import compare, run_bars, seconds
from core_tensor.dev.testing import run_ranks
from polytope_lp import Assignment, Marketplace, MatchingProblem, Policy, generate, solve, solve_many
from polytope_lp.matching.evaluation import FusedDual

GAMMA = 1e-3


def priced(problem: MatchingProblem) -> torch.Tensor:
    """Prices near the optimum, where a solver spends its evaluations."""
    return solve(problem, 1e-3).lam


def evaluation(quick: bool) -> dict[str, Any]:
    """One dual evaluation of 1M nonzeros at gamma 1e-3 against torch, with DuaLip's buckets and with narrower ones."""
    from torch_bucketed import BucketedDual

    problem = generate(Marketplace(sources=100_000))
    lam, dual, per = priced(problem), FusedDual(problem), problem.data.variables / 1e9
    single, load = lam.float(), dual.evaluate(lam, GAMMA).gradient + problem.budgets
    results: dict[str, Any] = {}
    for key, doubling in (("eval_vs_torch_bucketed", True), ("eval_vs_torch_narrow_buckets", False)):
        peer = BucketedDual(problem.data, problem.rows, doubling=doubling)
        error = float((peer.evaluate(single, GAMMA)[1] - load).abs().max() / load.abs().max())
        found = compare(
            lambda: [dual.evaluate(lam, GAMMA) for _ in range(5)],
            lambda peer=peer: peer.evaluate(single, GAMMA),
            pairs=25 if quick else 75,
        )
        detail = {
            "ours_ns_per_nonzero": round(statistics.median(found.ours) / 5 / per, 2),
            "torch_ns_per_nonzero": round(statistics.median(found.peer) / per, 1),
            "torch_load_error": error,
        }
        results |= {key: round(5 * found.speedup, 1), f"{key}_detail": detail}
    return results


def against_pdlp(kind: str, target: float, key: str) -> Callable[[bool], dict[str, Any]]:
    """Time to one repaired gap on 100k sources, ours against PDLP's."""

    def bar(quick: bool) -> dict[str, Any]:
        import pdlp_peer

        problem = generate(Marketplace(sources=100_000, kind=kind))
        lower = solve(problem, target / 10, time_limit=60).lower_bound
        ours, runs, solution = [], [], None
        for factor in (1.0, 0.1, 0.01):
            start = time.process_time()
            solution = solve(problem, target)
            ours.append(time.process_time() - start)
            run = pdlp_peer.solve(problem, factor * target)
            runs.append((run.tol, run.seconds, pdlp_peer.repaired_gap(problem, run.x, lower)))
            if runs[-1][2] <= target or (quick and runs[-1][1] > 60):
                break
        assert solution is not None
        return {
            key: round(runs[-1][1] / statistics.median(ours), 2),
            f"{key}_detail": {
                "ours_s": [round(s, 3) for s in ours],
                "ours_repaired_gap": pdlp_peer.repaired_gap(problem, solution.x().numpy(), lower),
                "ours_certified_gap": solution.gap,
                "pdlp": [{"tol": t, "seconds": round(s, 2), "repaired_gap": g} for t, s, g in runs],
                "pdlp_reached_the_gap": runs[-1][2] <= target,
            },
        }

    return bar


def bandwidth(quick: bool) -> dict[str, Any]:
    """12 bytes per nonzero over the time of one evaluation, relative to the rate of one thread that only reads."""
    problem = generate(Marketplace(sources=1_000_000))
    dual, lam = FusedDual(problem), priced(problem)
    big = torch.ones(1 << 26, dtype=torch.float64)
    found = compare(lambda: dual.evaluate(lam, GAMMA), big.sum, pairs=9 if quick else 25)
    rate = big.numel() * 8 / min(found.peer)
    fraction = statistics.median(
        12 * problem.data.variables / ours / (big.numel() * 8 / peer)
        for ours, peer in zip(found.ours, found.peer, strict=True)
    )
    return {
        "bandwidth_fraction": round(fraction, 3),
        "bandwidth_fraction_detail": {
            "read_gb_per_s": round(rate / 1e9, 1),
            "ns_per_nonzero": round(min(found.ours) / problem.data.variables * 1e9, 2),
        },
    }


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("Vm", "Rss"))}


def _solve_packed(folder: str, tol: float, threads: int, queue: Any) -> None:
    from polytope_lp import read_problem

    torch.set_num_threads(threads)
    solve(generate(Marketplace(sources=2000)), 1e-3)  # imports and first calls are not the problem's memory
    before = _resident()["VmRSS"]
    problem = read_problem(folder)
    start, cpu = time.monotonic(), time.process_time()
    solution = solve(problem, tol)
    seconds, cpu_seconds, peak = time.monotonic() - start, time.process_time() - cpu, _resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    settled, cpu = _resident(), time.process_time()
    verified = solution.verify()["ok"]
    queue.put(
        {
            "seconds": seconds,
            "bytes": peak["VmHWM"] - before,
            "peak_bytes": peak["VmHWM"],
            "verified": verified,
            "cpu_seconds": cpu_seconds,
            "verify_seconds": time.process_time() - cpu,
            "verify_bytes": _resident()["VmHWM"] - settled["VmRSS"],
            "variables": problem.data.variables,
            "status": solution.status,
            "gap": solution.gap,
            "history": solution.history,
        }
    )


def solve_apart(sources: int, tol: float, threads: int) -> dict[str, Any]:
    """Generate a packed problem and solve it in a process of its own, whose memory is then the solver's."""
    from polytope_lp.runs.folders import write_marketplace
    from polytope_lp.tables.pack import pack

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        write_marketplace(Marketplace(sources=sources), f"{folder}/problem")
        generated = time.process_time() - start
        pack(f"{folder}/problem", f"{folder}/packed")
        packed = time.process_time() - start - generated
        shutil.rmtree(f"{folder}/problem")
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        child = context.Process(target=_solve_packed, args=(f"{folder}/packed", tol, threads, queue))
        child.start()
        result: dict[str, Any] = queue.get()
        child.join()
    return result | {"generate_seconds": generated, "pack_seconds": packed}


def stages(found: dict[str, Any]) -> dict[str, float]:
    """How a run's stages compare, in CPU time: generation and packing per million variables, verification."""
    return {
        "generate_seconds_per_million": found["generate_seconds"] / found["variables"] * 1e6,
        "pack_seconds_per_million": found["pack_seconds"] / found["variables"] * 1e6,
        "first_evaluation_share": found["history"][0]["seconds"] / found["history"][-1]["seconds"],
        "verify_vs_solve_time": found["verify_seconds"] / found["cpu_seconds"],
        "verify_bytes_per_variable": found["verify_bytes"] / found["variables"],
    }


def ten_million(quick: bool) -> dict[str, Any]:
    """10M variables to a certified 1e-4: wall seconds of two threads, and resident bytes per variable."""
    del quick
    found = solve_apart(1_000_000, 1e-4, 2)
    return {
        "solve_10m_seconds": round(found["seconds"], 2),
        "solve_10m_detail": {name: found[name] for name in ("status", "gap", "variables")}
        | {"evaluations": len(found["history"])},
        "bytes_per_variable": round(found["bytes"] / found["variables"], 2),
        **{name: round(value, 3) for name, value in stages(found).items()},
    }


def hundred_million(quick: bool) -> dict[str, Any]:
    """100M variables to a certified 1e-4, with the convergence curve."""
    if quick:
        return {"solve_100m_seconds": None, "solve_100m_reason": "generating 100M edges takes minutes; without --quick"}
    found = solve_apart(10_000_000, 1e-4, 2)
    curve = [{name: entry[name] for name in ("evaluation", "seconds", "gap", "gamma")} for entry in found["history"]]
    return {
        "solve_100m_seconds": round(found["seconds"], 1),
        "solve_100m_peak_gb": round(found["peak_bytes"] / 1e9, 3),
        "solve_100m_detail": {name: found[name] for name in ("status", "gap", "variables")},
        "first_evaluation_share_99m": round(stages(found)["first_evaluation_share"], 3),
        "solve_100m_curve": curve,
    }


def assignment(quick: bool) -> dict[str, Any]:
    """Projection onto assignments (20 items, 10 slots, gamma 1e-3) against Clarabel: one by one, then in one call."""
    import clarabel
    import scipy.sparse

    items, slots, draws = 20, 10, 15
    random = np.random.default_rng(0)
    discount = 1 / np.log2(np.arange(slots) + 2)
    points = []
    for _ in range(draws):
        value = random.random((items, 1)) * discount * (1 + 0.05 * random.standard_normal((items, slots)))
        points.append(torch.from_numpy(value.ravel() / GAMMA))
    n = items * slots
    values, offsets = torch.cat(points), torch.arange(draws + 1) * n
    rows = Assignment(slots).rows(n)
    A = scipy.sparse.csc_matrix(scipy.sparse.vstack([rows.G, -scipy.sparse.eye_array(n)]))
    equations = int(rows.equation.sum())  # the slots, which stand first
    cones = [clarabel.ZeroConeT(equations), clarabel.NonnegativeConeT(rows.h.size - equations + n)]
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads = False, 1
    P = scipy.sparse.csc_matrix(scipy.sparse.eye_array(n))
    right = np.concatenate([rows.h, np.zeros(n)])

    def theirs() -> list[Any]:
        return [clarabel.DefaultSolver(P, -p.numpy(), A, right, cones, settings).solve().x for p in points]

    def ours() -> list[torch.Tensor]:
        return [Assignment(slots).project(p, offsets[:2]) for p in points]

    def batched() -> torch.Tensor:
        return Assignment(slots).project(values, offsets).view(draws, n)

    worst = max(float(np.abs(np.array(t) - o.numpy()).max()) for t, o in zip(theirs(), ours(), strict=True))
    pairs = 9 if quick else 15
    found, together = compare(ours, theirs, pairs=pairs), compare(batched, theirs, pairs=pairs)
    return {
        "assignment_vs_clarabel": round(found.speedup, 1),
        "assignment_vs_clarabel_detail": found.spread() | {"largest_difference": worst},
        "assignment_batched_vs_clarabel": round(together.speedup, 1),
    }


def policy_score(quick: bool) -> dict[str, Any]:
    """Microseconds of one `Policy.score`: 100 candidates, one row per variable, simplex; in the detail the equation."""
    candidates, calls = 100, 500  # over requests that stay in the second cache, as one that has just come in does
    random = np.random.default_rng(0)
    prices = random.random(1000) / 2
    requests = [
        (random.random(candidates), random.random(candidates), random.integers(0, prices.size, candidates))
        for _ in range(calls // 10)
    ] * 10
    at_most, equal = (Policy(prices, GAMMA, equality=equality) for equality in (False, True))
    found = compare(
        lambda: [at_most.score(*request) for request in requests],
        lambda: [equal.score(*request) for request in requests],
        pairs=25 if quick else 75,
    )
    ours, theirs = (
        [round(f(t) / calls * 1e6, 1) for f in (min, statistics.median, max)] for t in (found.ours, found.peer)
    )
    return {
        "policy_score_microseconds": ours[1],
        "policy_score_microseconds_detail": {"at_most": ours, "equal": theirs},
    }


def projections(quick: bool) -> dict[str, Any]:
    """Greatest KKT residual of the native projections in float64, relative to the size of the point."""
    random = np.random.default_rng(0)
    worst = 0.0
    for trial in range(200 if quick else 2000):
        n, scale = int(random.integers(1, 13)), 10.0 ** random.uniform(-2, 3)
        v = random.normal(size=n) * scale
        if trial % 5 == 0:
            v = np.round(v)
        u = np.full(n, np.inf) if trial % 4 == 0 else random.random(n) + 0.1
        w = np.ones(n) if trial % 4 < 2 else random.random(n) + 0.2
        d = float(random.random() + 0.1)
        x = project_blocks(
            torch.from_numpy(v),
            torch.tensor([0, n]),
            torch.tensor([d], dtype=torch.float64),
            None if np.isinf(u).all() else torch.from_numpy(u),
            None if (w == 1).all() else torch.from_numpy(w),
        ).numpy()
        u = np.minimum(u, d / w)  # no entry can pass d / w: one that stands there is at a bound
        free = (x > 0) & (x < u)
        theta = float(w[free] @ (v - x)[free] / (w[free] @ w[free])) if free.any() else _multiplier(v, x, u, w)
        residual = [
            np.abs(x - np.clip(v - max(theta, 0.0) * w, 0, u)).max(),
            max(w @ x - d, 0.0),
            abs(max(theta, 0.0) * (w @ x - d)) / max(1.0, np.abs(v).max()),
        ]
        worst = max(worst, max(residual) / max(1.0, np.abs(v).max()))
    return {"projection_kkt_max": float(worst)}


def _multiplier(v: Any, x: Any, u: Any, w: Any) -> float:
    # At a vertex any multiplier between the last entry at its bound and the first at zero will do.
    above = (v - u)[x >= u] / w[x >= u]
    below = v[x <= 0] / w[x <= 0]
    low, high = float(np.max(below, initial=0.0)), float(np.min(above, initial=np.inf))
    return low if low <= high else (low + high) / 2


def many_small(quick: bool) -> dict[str, Any]:
    """Problems of a thousand edges in one call against one by one, CPU time."""
    problems = [generate(Marketplace(sources=100, destinations=10, seed=seed)) for seed in range(20 if quick else 100)]
    found = compare(
        lambda: solve_many(problems), lambda: [solve(problem) for problem in problems], pairs=3 if quick else 7
    )
    each = statistics.median(found.ours) / len(problems)
    return {"many_vs_single": round(found.speedup, 1), "many_vs_single_detail": {"ms_each": round(1e3 * each, 2)}}


def _evaluations(rank: int, world_size: int) -> float:
    torch.set_num_threads(1)
    problem = generate(Marketplace(sources=1_000_000))
    dual = FusedDual(problem.shard(rank, world_size), dist.group.WORLD)
    lam = torch.full((problem.rows,), 1e-3, dtype=torch.float64)
    dual.evaluate(lam, GAMMA)

    def several() -> None:
        for _ in range(10):
            dual.evaluate(lam, GAMMA)

    dist.barrier()
    return min(seconds(several, time.monotonic) for _ in range(5))


def ranks(quick: bool) -> dict[str, Any]:
    """Wall time of ten evaluations of 10M nonzeros on one rank over that on two."""
    del quick
    one, two = max(run_ranks(_evaluations, 1)), max(run_ranks(_evaluations, 2))
    return {"scaling_2_ranks": round(one / two, 2), "scaling_2_ranks_detail": {"one_s": one, "two_s": two}}


if __name__ == "__main__":
    run_bars(
        "polytope-lp",
        {
            "eval_vs_torch_bucketed": evaluation,
            "b100k_1e4_vs_pdlp": against_pdlp("uncorrelated", 1e-4, "b100k_1e4_vs_pdlp"),
            "a100k_1e6_vs_pdlp": against_pdlp("tied", 1e-6, "a100k_1e6_vs_pdlp"),
            "verify_false_rejects": campaign.claims,
            "scale_invariance_max": campaign.scale_invariance,
            "netlib_solved": campaign.netlib,
            "many_vs_single": many_small,
            "bandwidth_fraction": bandwidth,
            "solve_10m_seconds": ten_million,
            "assignment_vs_clarabel": assignment,
            "policy_score_microseconds": policy_score,
            "projection_kkt_max": projections,
            "scaling_2_ranks": ranks,
            "solve_100m": hundred_million,
        },
    )
