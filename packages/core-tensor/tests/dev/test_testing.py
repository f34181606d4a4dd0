import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from core_tensor.dev.testing import assert_close, run_ranks, shared_data


def test_assert_close_is_relative_at_any_scale():
    for scale in (1e-30, 1.0, 1e30):
        reference = torch.tensor([1.0, 2.0], dtype=torch.float64) * scale
        assert_close("x", reference, reference * (1 + 1e-7), 1e-6)
        with pytest.raises(AssertionError, match="relative error"):
            assert_close("x", reference, reference * (1 + 1e-5), 1e-6)


def test_assert_close_sees_shapes_and_nan():
    with pytest.raises(AssertionError, match="shape"):
        assert_close("x", torch.zeros(2), torch.zeros(3), 1.0)
    with pytest.raises(AssertionError, match="NaN"):
        assert_close("x", torch.zeros(2), torch.tensor([0.0, float("nan")]), 1.0)


def _sum_of_ranks(rank, world_size, offset):
    value = torch.tensor([rank + offset])
    dist.all_reduce(value)
    return rank, world_size, int(value)


@pytest.mark.distributed
def test_run_ranks_joins_processes_by_gloo():
    assert run_ranks(_sum_of_ranks, 2, 10) == [(0, 2, 21), (1, 2, 21)]


@pytest.mark.distributed
def test_a_script_that_runs_ranks_does_not_run_again_in_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from core_tensor.dev.testing import run_ranks\n"
        "def rank_of(rank, world_size): return rank\n"
        "if __name__ == '__main__': print(run_ranks(rank_of, 2))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n") == ["[0, 1]", ""]


def test_shared_data_skips_visibly_where_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("CORE_TENSOR_SHARED_DATA", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="mnist/x is absent"):
        shared_data("mnist", "x")
    (tmp_path / "x").touch()
    assert shared_data("x") == tmp_path / "x"
