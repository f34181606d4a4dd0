"""The same answer by every road: several ranks, a killed and resumed run, the other optimiser, a warm start."""

import dataclasses
import multiprocessing
import os
import signal

import pytest
import torch
import torch.distributed as dist
from core_tensor.testing import run_ranks
from polytope_lp import Marketplace, generate, solve

MARKET = Marketplace(sources=4000, destinations=40, seed=5)


def _solve_shard(rank, world_size):
    problem = generate(MARKET)
    solution = solve(problem.shard(rank, world_size), 1e-4, group=dist.group.WORLD)
    return solution.status, solution.lower_bound, solution.upper_bound, solution.lam, solution.evaluations


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_agree_with_one_process(world_size):
    alone = solve(generate(MARKET), 1e-4)
    for status, lower, upper, lam, evaluations in run_ranks(_solve_shard, world_size):
        assert status == alone.status == "optimal"
        assert lower == pytest.approx(alone.lower_bound, rel=1e-10)
        assert upper == pytest.approx(alone.upper_bound, rel=1e-10)
        torch.testing.assert_close(lam, alone.lam, rtol=1e-10, atol=1e-12)
        assert evaluations == alone.evaluations


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
    with pytest.raises(ValueError, match="cannot be read"):
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
