import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from core_tensor.app.files import sha256
from core_tensor.app.ranks import ALONE
from lirank.data.parquet import ParquetLog
from lirank.data.split import Split
from lirank.features.prepare import prepare
from lirank.model.config import ModelConfig, load_config
from lirank.model.ranker import Ranker, cold_rows
from lirank.schema.features import SPECIAL, UNSEEN, Id, parse_schema
from lirank.train import checkpoint
from lirank.train.loop import BEST, CHECKPOINT, TrainConfig, Trainer, score
from lirank.train.run import TrainedModel

CONFIG = ModelConfig(dim=8, widths=(16, 8), cross_rank=8, history_width=8, dropout=0.2)
TRAINING = TrainConfig(epochs=2, batch_size=128, checkpoint_every=3, patience=2)


def trainer(prepared, config=CONFIG, training=TRAINING, ranks=ALONE):
    encoder = prepared.encoder()
    torch.manual_seed(training.seed)
    return Trainer(Ranker(encoder, config), encoder, training, ranks)


def test_a_killed_run_goes_on_to_the_same_bytes(prepared, tmp_path):  # RecBole#2126
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    trainer(prepared).fit(prepared.log("train"), prepared.log("valid"), tmp_path / "whole")

    class KilledError(Exception):
        pass

    def killer(steps):
        seen = []

        def kill(state):
            seen.append(state)
            if len(seen) == steps:
                raise KilledError

        return kill

    for stop in (4, 5, 3):  # between checkpoints, in both epochs
        with pytest.raises(KilledError):
            trainer(prepared).fit(prepared.log("train"), prepared.log("valid"), tmp_path / "killed", killer(stop))
        torch.rand(7)  # the next process has other random numbers
    trainer(prepared).fit(prepared.log("train"), prepared.log("valid"), tmp_path / "killed")
    for name in (BEST, CHECKPOINT):
        assert sha256(tmp_path / "whole" / name) == sha256(tmp_path / "killed" / name)


def test_one_inf_changes_no_weight(prepared, tmp_path):  # FuxiCTR#101
    run = trainer(prepared)
    encoder = run.encoder
    batch = encoder.encode(next(prepared.log("train").read(rows=64)))
    run.train_step(batch)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    state = [tensor.clone() for tensor in run.rows.state]
    with torch.no_grad():
        run.model.network.mlp.linear[0].weight[0, 0] = torch.inf
    before["network.mlp.linear.0.weight"] = run.model.network.mlp.linear[0].weight.clone()
    with pytest.raises(ValueError, match=r"step 2: .*no weight was changed"):
        run.train_step(batch)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(torch.equal(a, b) for a, b in zip(state, run.rows.state, strict=True))


def test_unseen_ids_score_equal_and_as_the_trained_cold_row(prepared, trained):  # FuxiCTR#128
    table = next(prepared.log("test").read(rows=2))
    rows = pa.concat_tables([table.slice(0, 1)] * 2)
    unseen = pa.array(["never seen", "nor this"], pa.large_string())
    rows = rows.set_column(rows.column_names.index("item"), "item", unseen)
    batch = trained.encoder.encode(rows)
    start = trained.encoder.layout.offsets["item"]
    assert batch.ids[:, 1].tolist() == [start + UNSEEN] * 2
    assert torch.equal(batch.ids[0], batch.ids[1])
    found = trained.model.predict(batch)
    # the same input, but vector instructions round the ends of a batch otherwise: the bound of replay = serve
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert bool((trained.model.table.weight[start + UNSEEN] != 0).any())  # trained by dropping ids


def test_cold_rows_keep_the_hashes_of_an_id_together(trained):
    layout = trained.encoder.layout
    batch_ids = torch.tensor([[start + SPECIAL for start, _ in layout.ranges]] * 500)
    torch.manual_seed(0)
    found = cold_rows(batch_ids, layout, 0.3)
    cold = found == torch.tensor([start + UNSEEN for start, _ in layout.ranges])
    assert torch.equal(cold[:, 2], cold[:, 3])  # city has two rows
    assert 0.2 < float(cold.float().mean()) < 0.4


def test_a_schema_without_ids_trains(tmp_path):
    table = pa.table({"tags": [[1, 2], [3]] * 40, "y": [0, 1] * 40})
    pq.write_table(table, tmp_path / "l.parquet")
    schema = parse_schema("features: [{kind: multi, name: tags, rows: 32}]\nlabels: [{name: y}]")
    found = prepare(ParquetLog.open(tmp_path / "l.parquet"), schema, Split("random", 0.0, 0.0), tmp_path / "d")
    run = Trainer(Ranker(found.encoder(), CONFIG), found.encoder(), TrainConfig(epochs=1, batch_size=16))
    assert len(run.fit(found.log("train"), None, tmp_path)) == 1


def test_sampled_negatives_are_corrected(tmp_path):  # recommenders#219
    rng = np.random.default_rng(0)
    n = 60_000
    x = rng.normal(size=n)
    y = (rng.random(n) < 1 / (1 + np.exp(2.5 - x))).astype(np.int64)
    kept = (y == 1) | (rng.random(n) < 0.1)
    pq.write_table(
        pa.table({"u": rng.integers(5, size=kept.sum()), "x": x[kept], "y": y[kept]}), tmp_path / "l.parquet"
    )
    schema = parse_schema("sampling: 0.1\nfeatures: [{kind: id, name: u}, {kind: dense, name: x}]\nlabels: [{name: y}]")
    found = prepare(ParquetLog.open(tmp_path / "l.parquet"), schema, Split("random", 0.1, 0.0), tmp_path / "d")
    encoder = found.encoder()
    torch.manual_seed(0)
    model = Ranker(encoder, ModelConfig(dim=4, widths=(8,)))
    Trainer(model, encoder, TrainConfig(epochs=4, batch_size=256)).fit(found.log("train"), found.log("valid"), tmp_path)
    world = encoder.encode(pa.table({"u": rng.integers(5, size=n), "x": x, "y": y}))
    assert float(model.predict(world).mean()) == pytest.approx(y.mean(), rel=0.06)


def test_position_is_used_in_training_and_absent_in_scoring(prepared, trained):  # LightGBM#6506
    batch = trained.encoder.encode(next(prepared.log("test").read(rows=20)))
    without = dataclasses.replace(batch, position=None)
    assert torch.equal(trained.model.predict(batch), trained.model.predict(without))
    moved = dataclasses.replace(batch, position=batch.position + 1)
    assert not torch.equal(trained.model(batch), trained.model(moved))


@pytest.mark.parametrize(
    "changes",
    [
        {"cross": "full"},
        {"cross": "none"},
        {"cross": "residual"},
        {"gate": "lhuc"},
        {"gate": "dense", "tasks": "ple", "task_widths": (4,)},
        {"tasks": "mmoe", "experts": 2, "gate_dropout": 0.2},
        {"calibration": "joint", "history_fusion": "late"},
        {"embed_dense": True, "history_layers": 2},
    ],
)
def test_every_part_trains(prepared, changes):
    run = trainer(prepared, ModelConfig(dim=8, widths=(16, 8), cross_rank=8, history_width=8, **changes))
    batch = run.encoder.encode(next(prepared.log("train").read(rows=256)))
    losses = [run.train_step(batch) for _ in range(60)]
    assert np.mean(losses[-5:]) < losses[0] - 0.05


def test_an_empty_bag_in_the_middle_and_histories_of_no_length(prepared, trained):  # pytorch#58567
    table = next(prepared.log("test").read(rows=3))
    tags = pa.array([["t1"], [], ["t2"]], pa.large_list(pa.large_string()))
    table = table.set_column(table.column_names.index("tags"), "tags", tags)
    together = trained.model.predict(trained.encoder.encode(table))
    alone = torch.cat([trained.model.predict(trained.encoder.encode(table.slice(i, 1))) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_memory_follows_the_true_lengths(prepared):
    from lirank.model.ranker import padded

    encoder = prepared.encoder()
    batch = encoder.encode(next(prepared.log("train").read(rows=64)))
    lists = batch.lists["seen"]
    items, lengths = padded(lists, torch.ones(len(lists.values), 3))
    assert items.shape[1] == int(lengths.max())
    assert float(items.sum()) == 3 * len(lists.values)


def test_a_checkpoint_of_another_schema_or_model_is_refused(prepared, trained, tmp_path):
    trained.save(tmp_path)
    again = TrainedModel.load(tmp_path)
    batch = trained.encoder.encode(next(prepared.log("test").read(rows=20)))
    assert torch.equal(again.model.predict(batch), trained.model.predict(batch))
    other = trainer(prepared, ModelConfig(dim=4))
    checkpoint.save(tmp_path / CHECKPOINT, {f"model.{k}": v for k, v in trained.model.state_dict().items()}, {})
    with pytest.raises(ValueError, match="another"):
        other.fit(prepared.log("train"), None, tmp_path)
    for name in ("model.safetensors", "encoder.safetensors", "causal.safetensors"):
        raw = (tmp_path / name).read_bytes()
        for broken in (raw[: len(raw) // 2], b"", b"\x00" * 50):
            (tmp_path / name).write_bytes(broken)
            with pytest.raises(ValueError, match=name):
                TrainedModel.load(tmp_path)
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match="finished"):
        TrainedModel.load(tmp_path / "absent")


def test_scores_do_not_depend_on_the_batches(prepared, trained):
    few, many = (score(trained.model, trained.encoder, prepared.log("test"), rows=n) for n in (7, 500))
    assert np.allclose(few["p"], many["p"], atol=1e-6)


def test_configuration_files(tmp_path):
    (tmp_path / "m.yaml").write_text("dim: 8\ncross: residual\n")
    assert load_config(tmp_path / "m.yaml").cross == "residual"
    for text in ("dims: 8", "dim: 0", "cross: cubic", "\x00", "[1"):
        (tmp_path / "m.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"m\.yaml"):
            load_config(tmp_path / "m.yaml")


def test_empty_training_part_and_disagreeing_logs(tmp_path, table, schema):
    pq.write_table(table.drop_columns(["price"]), tmp_path / "l.parquet")
    with pytest.raises(ValueError, match="'price'"):
        prepare(ParquetLog.open(tmp_path / "l.parquet"), schema, Split(), tmp_path / "d")


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(tmp_path, log_file, schema):
    schema.save(tmp_path / "schema.yaml")
    base = [sys.executable, "-m", "lirank", "train", str(log_file), "--schema", str(tmp_path / "schema.yaml")]
    options = ["--epochs", "3", "--batch-size", "32", "--checkpoint-every", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*base, "-o", str(tmp_path / "whole"), *options], check=True, env=environment, capture_output=True)
    killed = 0
    for _ in range(5):
        process = subprocess.Popen([*base, "-o", str(tmp_path / "killed"), *options], env=environment)
        checkpoint_file = tmp_path / "killed" / CHECKPOINT
        before = checkpoint_file.stat().st_mtime_ns if checkpoint_file.exists() else 0
        while process.poll() is None and (not checkpoint_file.exists() or checkpoint_file.stat().st_mtime_ns == before):
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    subprocess.run([*base, "-o", str(tmp_path / "killed"), *options], check=True, env=environment, capture_output=True)
    assert killed > 0
    assert sha256(tmp_path / "whole" / "model.safetensors") == sha256(tmp_path / "killed" / "model.safetensors")


def test_ids_of_the_schema_have_rows(trained):
    for feature in trained.encoder.schema.of(Id):
        start, end = trained.encoder.layout.span(feature.name)
        assert end - start == feature.rows
