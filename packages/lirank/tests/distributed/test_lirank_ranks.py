"""Training on several processes: equal to one, and continued on another number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from core_tensor.app import ranks
from core_tensor.dev.testing import run_ranks
from lirank.distributed.tables import ShardedTable
from lirank.features.prepare import Prepared
from lirank.model.config import ModelConfig
from lirank.model.ranker import Ranker
from lirank.train import checkpoint
from lirank.train.loop import BEST, CHECKPOINT, TrainConfig, Trainer, score
from lirank.train.prior import TABLE, CurvaturePrior

CONFIG = ModelConfig(dim=4, widths=(8,), cross_rank=4, history_width=4)
TRAINING = TrainConfig(epochs=1, batch_size=256, checkpoint_every=2)


class StoppedError(Exception):
    pass


def fit(rank, size, data, rows, folder, stop):
    """Scores of the test rows after training, by all ranks; with `stop` the training is left at that step."""
    us, prepared = ranks.current(), Prepared(Path(data), rows, [])
    encoder = prepared.encoder()
    torch.manual_seed(0)
    table = ShardedTable(encoder.layout.rows, CONFIG.dim, us) if size > 1 else None
    model = Ranker(encoder, CONFIG, table).double()  # so that the order of sums hardly matters to Adam
    trainer, steps = Trainer(model, encoder, TRAINING, us), []

    def count(state):
        steps.append(state)
        if len(steps) == stop:
            raise StoppedError

    try:
        trainer.fit(prepared.log("train"), prepared.log("valid"), Path(folder), count)
    except StoppedError:
        return with_prior(us, prepared, Path(folder) / "prior")
    if size > 1:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match="shared out"):
            Trainer(model, encoder, TRAINING, us, CurvaturePrior(1.0, zeros, zeros))
    return score(model, encoder, prepared.log("test"), ranks=us)["p"]


def with_prior(us, prepared, folder):
    """Scores of the test rows after a training that remembers others, as `--from` trains: every rank has the table."""
    if us.first:
        folder.mkdir()
    us.barrier()
    encoder, train = prepared.encoder(), prepared.log("train")
    torch.manual_seed(0)
    model = Ranker(encoder, CONFIG).double()
    curvature = Trainer(model, encoder, TRAINING).curvature(train)
    anchor = {name: model.state_dict()[name] + 0.1 for name in curvature}
    prior = CurvaturePrior.of(3.0, anchor, curvature)
    Trainer(model, encoder, TRAINING, us, prior).fit(train, None, folder)
    return score(model, encoder, prepared.log("test"))["p"]


@pytest.mark.distributed
def test_two_ranks_are_stopped_and_three_finish_what_one_does(prepared, tmp_path):
    data = (str(prepared.folder), prepared.rows)
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    alone = fit(0, 1, *data, tmp_path / "one", 0)
    remembering = with_prior(ranks.ALONE, Prepared(Path(data[0]), data[1], []), tmp_path / "prior")
    for found in run_ranks(fit, 2, *data, str(tmp_path / "many"), 3):
        np.testing.assert_allclose(found, remembering, rtol=0, atol=1e-8)
    assert np.abs(remembering - alone).max() > 1e-3
    record = checkpoint.load(tmp_path / "many" / CHECKPOINT)[1]
    assert (record["step"], len(record["shards"]["files"])) == (2, 2)
    for found in run_ranks(fit, 3, *data, str(tmp_path / "many"), 0):
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-8)
    rows = prepared.encoder().layout.rows
    for name in (BEST, CHECKPOINT):  # weights and optimizer state, all ranks' rows together
        whole = checkpoint.Shape(rows, 0, rows, ranks.ALONE)
        one, many = (checkpoint.load_shared(tmp_path / folder / name, whole)[0] for folder in ("one", "many"))
        assert {k for k in one if "random" not in k} == {k for k in many if "random" not in k}
        for key in one:
            if "random" not in key:
                torch.testing.assert_close(many[key], one[key], rtol=1e-6, atol=1e-8, msg=key)
    assert len(list((tmp_path / "many").glob("*-of-*"))) == 6  # three of each file; those of two ranks are gone


def test_one_rank_reads_what_several_wrote_and_the_reverse(tmp_path):
    table = torch.arange(14.0).view(7, 2)
    checkpoint.save(
        tmp_path / "a.safetensors", {f"model.{TABLE}": table, "rows.0": table * 2, "x": table[:1].clone()}, {}
    )
    for rank, expected in ((0, table[:4]), (1, table[4:])):
        us = ranks.Ranks(rank, 2)
        found, _ = checkpoint.load_shared(tmp_path / "a.safetensors", checkpoint.Shape(7, 4 * rank, len(expected), us))
        assert torch.equal(found[f"model.{TABLE}"], expected)
        assert torch.equal(found["rows.0"], 2 * expected)
        assert torch.equal(found["x"], table[:1])


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun(tmp_path, make_table, schema_text):
    pq.write_table(make_table(2000), tmp_path / "log.parquet", row_group_size=500)
    (tmp_path / "schema.yaml").write_text(schema_text)
    (tmp_path / "model.yaml").write_text("dim: 8\nwidths: [16, 8]\ncross_rank: 8\nhistory_width: 8\n")
    arguments = ["-m", "lirank", "train", "log.parquet", "--schema", "schema.yaml", "--model", "model.yaml", "--json"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for name, before in (("one", []), ("two", launch)):
        command = [sys.executable, *before, *arguments, "--epochs", "2", "-o", name]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=one_thread, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))  # one process prints
    one, two = found
    assert two["rows"] == one["rows"]
    assert two["test"]["click"]["auc"] == pytest.approx(one["test"]["click"]["auc"], abs=0.01)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("one", "two")]
    assert abs(sizes[0] - sizes[1]) < 1000  # the record of the losses differs
    newer = make_table(800, seed=1)
    newer = newer.set_column(0, "time", pc.add(newer["time"], 20_000))
    pq.write_table(newer, tmp_path / "newer.parquet", row_group_size=500)
    command = [sys.executable, *launch, "-m", "lirank", "train", "newer.parquet", "--from", "two", "--json"]
    command += ["--epochs", "1", "-o", "three"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=one_thread, check=False)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["before"]) == {"click", "like"}
    assert (tmp_path / "three" / "curvature.safetensors").exists()
