import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from core_tensor.app import ranks
from core_tensor.app.files import atomic_path
from core_tensor.app.runs import RECORD, RunFolder, read_record
from core_tensor.dev.testing import run_ranks


@dataclass(frozen=True)
class Options:
    lr: float = 0.1
    cap: float = float("inf")


def _claim(folder, overwrite=False, **inputs):
    return RunFolder.claim(
        folder, "core-tensor train", {"steps": 3, "options": Options(), **inputs}, overwrite=overwrite
    )


def test_the_same_command_goes_on_and_a_finished_run_knows_its_result(tmp_path):
    with _claim(tmp_path / "run") as run:
        assert not run.resumed
        assert run.result is None
    with _claim(tmp_path / "run") as run:
        assert run.resumed
        run.finish({"loss": torch.tensor(0.5)})
    with _claim(tmp_path / "run") as run:
        assert run.result == {"loss": 0.5}
    record = read_record(tmp_path / "run")
    assert record["inputs"]["options"] == {"lr": 0.1, "cap": "inf"}
    assert record["inputs"]["version"]


def test_other_inputs_are_refused_and_named_and_nothing_is_lost(tmp_path):
    with _claim(tmp_path) as run:
        (run.path / "checkpoint").write_text("precious")
    with (
        pytest.raises(ValueError, match=r"options\.lr: 0\.1 then, 0\.2 now; seed: null then, 4 now"),
        _claim(tmp_path, options=Options(lr=0.2), seed=4),
    ):
        pass
    with pytest.raises(ValueError, match="holds a run of `core-tensor train`"), RunFolder.claim(tmp_path, "x y", {}):
        pass
    assert (tmp_path / "checkpoint").read_text() == "precious"
    with _claim(tmp_path, overwrite=True, seed=4) as run:
        assert not run.resumed
        assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="expected an empty folder"), _claim(tmp_path, overwrite=overwrite):
        pass
    assert (tmp_path / "thesis.tex").exists()
    assert not (tmp_path / RECORD).exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"command": 3, "inputs": {}, "result": null}', "\0"])
def test_a_broken_record_is_named(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ValueError, match=RECORD), _claim(tmp_path):
        pass


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a run"):
        read_record(tmp_path)


def test_a_second_claim_is_refused_while_the_first_lasts(tmp_path):
    with _claim(tmp_path), pytest.raises(ValueError, match="another process is writing here"), _claim(tmp_path):
        pass
    with _claim(tmp_path) as run:
        assert run.resumed


def _work_until_killed(folder):
    with _claim(folder), atomic_path(folder / "edges.parquet") as temporary:
        temporary.write_text("half")
        (folder / "ready").touch()
        time.sleep(60)


def test_a_killed_process_leaves_no_lock_and_no_orphan(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_work_until_killed, args=(tmp_path,))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    assert not list(tmp_path.glob("*.parquet"))
    assert list(tmp_path.glob(".partial-*"))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with _claim(tmp_path) as run:
        assert run.resumed
        assert not list(tmp_path.glob(".partial-*"))


def _claim_in_ranks(rank, world_size, folder, seed):
    try:
        with RunFolder.claim(folder, "core-tensor train", {"seed": seed}, ranks=ranks.current()) as run:
            return run.resumed
    except ValueError as error:
        return str(error)


@pytest.mark.distributed
def test_rank_0_claims_for_all(tmp_path):
    assert run_ranks(_claim_in_ranks, 2, str(tmp_path), 1) == [False, False]
    assert run_ranks(_claim_in_ranks, 2, str(tmp_path), 1) == [True, True]
    refused = run_ranks(_claim_in_ranks, 2, str(tmp_path), 2)
    assert refused[0] == refused[1]
    assert "seed: 1 then, 2 now" in refused[0]
    assert json.loads(Path(tmp_path, RECORD).read_text())["inputs"]["seed"] == 1
