"""The same answer by every road: several ranks, a killed and resumed run, the other optimizer, a warm start."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from core_tensor.dev.testing import run_ranks
from polytope_lp import Marketplace, generate, read_problem, solve

MARKET = Marketplace(sources=4000, destinations=40, seed=5)


def _solve_shard(rank, world_size, path, killed=None, group=None):
    reported = []

    def report(entry):
        reported.append(entry["evaluation"])
        if rank == killed and reported[-1] == 12:
            os.kill(os.getpid(), signal.SIGKILL)

    shard = generate(MARKET).shard(rank, world_size)
    saved = {} if path is None else {"checkpoint": path, "checkpoint_every": 2}
    solution = solve(shard, 1e-4, group=group or dist.group.WORLD, report=report, **saved)
    found = (solution.status, solution.lower_bound, solution.upper_bound, solution.lam, solution.evaluations)
    return (*found, reported[0])


def _solve_in_groups(rank, world_size, path):
    # One, two and all four ranks, and two that go on, in groups of one set of processes: starting them costs most.
    results = []
    for size, state in ((1, None), (2, None), (world_size, None), (2, path)):
        group = dist.new_group(list(range(size)))
        if rank < size:
            results.append(_solve_shard(rank, size, state, group=group))
    return results


@pytest.mark.slow
@pytest.mark.distributed
def test_one_two_and_four_ranks_agree_and_killed_ones_resume(tmp_path):
    path = tmp_path / "state.npz"
    with pytest.raises((torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException)):
        run_ranks(_solve_shard, 2, path, 1)
    files = {p.name for p in tmp_path.iterdir()}
    assert {"state.0.npz", "state.1.npz"} <= files <= {f"state.{r}{b}.npz" for r in (0, 1) for b in ("", ".before")}
    alone, found = solve(generate(MARKET), 1e-4), run_ranks(_solve_in_groups, 4, path)
    assert [len(results) for results in found] == [4, 3, 1, 1]
    assert [result[-1] > 2 for result in found[0]] == [False, False, False, True]  # the last one went on
    for status, lower, upper, lam, evaluations, _ in (result for results in found for result in results):
        assert status == alone.status == "optimal"
        assert lower == pytest.approx(alone.lower_bound, rel=1e-10)
        assert upper == pytest.approx(alone.upper_bound, rel=1e-10)
        torch.testing.assert_close(lam, alone.lam, rtol=1e-10, atol=1e-12)
        assert evaluations == alone.evaluations


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_writes_what_one_process_writes(tmp_path):
    from polytope_lp.runs.folders import verify_folder, write_marketplace

    write_marketplace(MARKET, tmp_path / "problem")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "polytope_lp", "solve", tmp_path / "problem", "-o", tmp_path / "out", "--json"]
    done = subprocess.run([*run, *map(str, command)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["sources"] == read_problem(tmp_path / "problem").data.blocks
    assert verify_folder(tmp_path / "out")["ok"]
    assert result["lower_bound"] == pytest.approx(solve(read_problem(tmp_path / "problem")).lower_bound, rel=1e-10)
    assert not list((tmp_path / "out").glob("checkpoint*"))


def _die_midway(path, last):
    torch.set_num_threads(1)

    def report(entry):
        if entry["evaluation"] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    solve(generate(MARKET), 1e-5, report=report, checkpoint=path, checkpoint_every=2)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    path = tmp_path / "state.npz"
    whole = solve(generate(MARKET), 1e-5)
    assert whole.evaluations > 16
    child = multiprocessing.get_context("fork").Process(target=_die_midway, args=(path, whole.evaluations // 2))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert path.exists()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    started = []
    resumed = solve(generate(MARKET), 1e-5, report=lambda entry: started.append(entry["evaluation"]), checkpoint=path)
    assert started[0] > 2  # it went on, it did not begin again
    assert torch.equal(resumed.lam, whole.lam)
    assert resumed.lower_bound == whole.lower_bound
    assert resumed.upper_bound == whole.upper_bound


def test_a_checkpoint_of_another_problem_is_refused(tmp_path):
    path = tmp_path / "state.npz"
    solve(generate(MARKET), 1e-4, checkpoint=path, checkpoint_every=1)
    with pytest.raises(ValueError, match="another problem"):
        solve(generate(Marketplace(sources=3000, destinations=40)), 1e-4, checkpoint=path)
    problem = generate(MARKET)
    other = [
        dataclasses.replace(problem, budgets=problem.budgets * torch.linspace(0.9, 1.1, 40, dtype=torch.float64)),
        dataclasses.replace(problem, data=dataclasses.replace(problem.data, cap=2 * problem.data.cap)),
    ]
    for changed in other:
        with pytest.raises(ValueError, match="another problem"):
            solve(changed, 1e-4, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="expected an npz file"):
        solve(problem, 1e-4, checkpoint=path)


def test_accelerated_gradient_certifies_too():
    solution = solve(generate(MARKET), 1e-3, method="accelerated")
    assert solution.status == "optimal"
    assert solution.gap <= 1e-3
    assert solution.verify()["ok"]


def test_a_warm_start_saves_evaluations():
    problem = generate(MARKET)
    cold = solve(problem, 1e-4)
    warm = solve(problem, 1e-4, warm_start=cold.lam)
    assert warm.status == "optimal"
    assert warm.evaluations < cold.evaluations


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method: expected one of"):
        solve(generate(MARKET), method="simplex")
