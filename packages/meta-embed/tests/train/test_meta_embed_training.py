"""The outer loop: what it minimizes, when it stops, how it resumes, and two processes against one."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from core_tensor.app.ranks import Ranks
from core_tensor.app.runs import RunFolder
from core_tensor.dev.testing import assert_close, run_ranks
from meta_embed.cli import main
from meta_embed.config import TrainOptions
from meta_embed.evidence.generator import make_world
from meta_embed.generate.job import GenerateOptions, generate
from meta_embed.generate.vectors import make_vectors
from meta_embed.model.build import build_model, load_model
from meta_embed.tasks.encode import build_vocabulary
from meta_embed.tasks.episodes import epoch
from meta_embed.tasks.events import build_events, read_table
from meta_embed.train import outer
from meta_embed.train.checkpoint import Progress
from meta_embed.train.outer import fit, held_back_tasks, mean_loss, outer_step, split_members
from meta_embed.train.run import train_run
from safetensors import safe_open


@pytest.fixture(scope="module")
def parts(trained):
    """Training and held-back log."""
    train, held_back, _ = split_members(trained.events, trained.config, 0)
    return trained.events.choose(train), trained.events.choose(held_back)


def _config(trained, **changes):
    train = TrainOptions(**({"epochs": 4, "warm_epochs": 1, "lr": 0.01} | changes))
    return msgspec.structs.replace(trained.config, train=train)


def _fit(trained, parts, config=None, **options):
    config = config or _config(trained)
    model = build_model(config, trained.vocabulary)
    return model, fit(model, *parts, config, **options)


def test_a_step_descends_the_mean_query_loss_of_all_tasks(trained, parts):
    """Its gradient is that of the definition, task by task."""
    model = build_model(trained.config, trained.vocabulary)
    (batch, weight), *_ = epoch(parts[0], trained.config.episodes, np.random.default_rng(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    outer_step(model, optimizer, batch, weight)
    step = [p.grad.clone() for p in model.parameters()]
    e, _ = model.adapt(batch.member_ids, batch.member_dense, batch.support)
    total, first = 0.0, 0
    for t, n in enumerate(batch.query.lengths.tolist()):
        rows = slice(first, first + n)
        first += n
        z = model.logits(batch.query.ids[rows], batch.query.dense[rows], e[t].expand(n, -1))
        y = batch.query.y[rows]
        total = total - (y * torch.nn.functional.logsigmoid(z) + (1 - y) * torch.nn.functional.logsigmoid(-z)).sum()
    expected = torch.autograd.grad(total / first, list(model.parameters()), allow_unused=True)
    norm = torch.nn.utils.get_total_norm([g for g in expected if g is not None])
    for one, other in zip(expected, step, strict=True):
        assert_close("gradient", torch.zeros_like(other) if one is None else one * min(1.0, 5.0 / norm), other, 1e-4)


def test_training_helps_members_it_never_saw(trained):
    world = make_world(300, items=8, d=2, tau=1.5, longest=30, least=20, seed=3)
    vocabulary = build_vocabulary(world.table, trained.config.columns)
    events = build_events(world.table, trained.config.columns, vocabulary)
    parts = [events.choose(part) for part in split_members(events, trained.config, 0)[:2]]
    config = _config(trained, epochs=6, warm_epochs=0, lr=0.03, patience=6)
    model = build_model(config, vocabulary)
    progress = fit(model, *parts, config)
    losses = [entry["held_back_loss"] for entry in progress.history]
    assert progress.best == min(losses) < losses[0] - 0.05
    tasks = list(held_back_tasks(parts[1], config.episodes))
    assert mean_loss(model, tasks) == progress.best  # it ends with the best weights


def test_it_stops_when_the_held_back_members_no_longer_gain(trained, parts, monkeypatch):
    losses = iter([0.9, 0.7, 0.8, 0.75, 0.71, 0.1])
    seen = []

    def pretended(model, tasks):
        seen.append({n: t.clone() for n, t in model.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(outer, "mean_loss", pretended)
    model, progress = _fit(trained, parts, _config(trained, epochs=20, patience=3))
    assert (progress.epoch, progress.best_epoch, progress.best) == (4, 1, 0.7)
    assert all(torch.equal(t, seen[1][n]) for n, t in model.state_dict().items())


def test_a_training_that_diverges_names_the_rate(trained, parts):
    with pytest.raises(ValueError, match=r"train\.lr: the training diverged \(.*\); lower the rate"):
        _fit(trained, parts, _config(trained, lr=1e30))


def test_nobody_to_train_on(trained, parts):
    empty = parts[0].choose(np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="expected members to train on and to hold back"):
        fit(build_model(_config(trained), trained.vocabulary), empty, parts[1], _config(trained))
    weightless = dataclasses.replace(parts[1], w=np.zeros_like(parts[1].w))
    with pytest.raises(ValueError, match="weights: expected some above 0"):
        fit(build_model(_config(trained), trained.vocabulary), parts[0], weightless, _config(trained))
    clicks = dataclasses.replace(parts[0], y=np.ones_like(parts[0].y))
    with pytest.raises(ValueError, match="labels: expected both kinds, got 1 alone"):
        fit(build_model(_config(trained), trained.vocabulary), clicks, parts[1], _config(trained))


@pytest.mark.parametrize("method", ["map", "maml"])
def test_interrupted_and_resumed_is_bit_identical(trained, parts, tmp_path, method):
    config = _config(trained)
    config = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, method=method))
    whole, progress = _fit(trained, parts, config, folder=tmp_path / "a")

    class StopError(Exception):
        pass

    def stop(entry):
        if entry["epoch"] == 3:  # after the checkpoint of epoch 2
            raise StopError

    (tmp_path / "b").mkdir()
    with pytest.raises(StopError):
        _fit(trained, parts, config, folder=tmp_path / "b", report=stop)
    resumed, other = _fit(trained, parts, config, folder=tmp_path / "b")
    assert other.history == progress.history
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert isinstance(other, Progress)


DIES = """
import os, signal, sys
from meta_embed.cli import main
from meta_embed.train import checkpoint
original = checkpoint.save
def dies(folder, model, optimizer, rng, progress):
    original(folder, model, optimizer, rng, progress)
    if progress.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save = dies
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def command(trained, tmp_path_factory):
    """`meta-embed train` on the small world, up to the folder of the run."""
    folder = tmp_path_factory.mktemp("commands")
    config = msgspec.to_builtins(_config(trained))
    (folder / "c.yaml").write_bytes(msgspec.yaml.encode(config))
    return ["train", str(trained.parquet), "-c", str(folder / "c.yaml"), "--no-tune", "-o"]


def test_killed_by_a_signal_and_resumed_by_the_same_command(command, tmp_path):
    main([*command, str(tmp_path / "whole")], standalone_mode=False)
    killed = subprocess.run([sys.executable, "-c", DIES, *command, str(tmp_path / "r")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "r" / "model.json").exists()
    main([*command, str(tmp_path / "r")], standalone_mode=False)
    for name in ("model.safetensors", "model.json", "checkpoint.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "r" / name).read_bytes(), name


def test_a_checkpoint_of_another_model_is_refused(trained, parts, tmp_path):
    _fit(trained, parts, folder=tmp_path)
    wider = _config(trained)
    wider = msgspec.structs.replace(wider, model=msgspec.structs.replace(wider.model, width=6))
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: expected a checkpoint of this run"):
        _fit(trained, parts, wider, folder=tmp_path)


# ---------------------------------------------------------------------------------------------- two processes, and one


def _two(rank, size, run, events, command, folder):
    """One gradient, a training by the command as torchrun starts it, and a sharded generation."""
    os.environ["WORLD_SIZE"] = str(size)
    ranks = Ranks(rank, size)
    job = load_model(run)
    gradient = _gradient(load_model(run)[0], job[1], events, ranks)
    main([*command, f"{folder}/r2"], standalone_mode=False)
    options = GenerateOptions(codec="float32", precision="full", buckets=5)
    made = generate(*job, Path(events), f"{folder}/two", Path(folder) / "w2", options, ranks=ranks)
    return gradient, made


def _gradient(model, config, events, ranks):
    model = model.double()  # the order of the sum is all that differs
    table = read_table(events, config.columns)
    log = build_events(table, config.columns, build_vocabulary(table, config.columns))
    (batch, weight), *_ = epoch(log, config.episodes, np.random.default_rng(0), ranks.rank, ranks.size)
    outer_step(model, torch.optim.SGD(model.parameters(), lr=0.0), _double(batch), weight, ranks)
    return [p.grad for p in model.parameters()]


def _double(batch):
    import dataclasses

    def wide(value):
        if dataclasses.is_dataclass(value):
            return type(value)(*(wide(getattr(value, f.name)) for f in dataclasses.fields(value)))
        return value.double() if value.is_floating_point() else value

    return wide(batch)


RUNS = ("r1", "r2")


@pytest.mark.distributed
def test_two_processes_do_what_one_does(trained, command, tmp_path):
    """Gradients agree to rounding, a training to what float32 makes of it, a store to the last byte."""
    (one, made), (two, also) = run_ranks(_two, 2, str(trained.run), str(trained.parquet), command, str(tmp_path))
    assert made == also
    alone = _gradient(trained.model(), trained.config, str(trained.parquet), Ranks())
    for a, b, c in zip(alone, one, two, strict=True):
        assert torch.equal(b, c)
        assert_close("gradient", a, b, 1e-12)
    options = GenerateOptions(codec="float32", precision="full", buckets=5)
    generate(*trained.job(), trained.parquet, str(tmp_path / "one"), tmp_path / "w1", options)
    assert (tmp_path / "one/store.lmdb").read_bytes() == (tmp_path / "two/store.lmdb").read_bytes()
    main([*command, str(tmp_path / "r1")], standalone_mode=False)
    (single, *_), (double, *_) = load_model(tmp_path / "r1"), load_model(tmp_path / "r2")
    history = [json.loads(safe_open(tmp_path / r / "checkpoint.safetensors", "pt").metadata()["about"]) for r in RUNS]
    for x, y in zip(history[0]["history"], history[1]["history"], strict=True):
        assert x == pytest.approx(y, rel=1e-4)  # the loss is that of all tasks, not of one process's
    for (name, x), y in zip(single.state_dict().items(), double.state_dict().values(), strict=True):
        assert float((x - y).abs().max()) <= 1e-3, name  # Adam divides by small gradients: rounding may grow a little


@pytest.mark.parametrize(("factor", "shift"), [(1e-6, 0.0), (1e6, 0.0), (3.0, 1e4)])
def test_units_of_dense_features_do_not_matter(trained, tmp_path, factor, shift):
    """A profile in other units gives the vectors of the profile as it was, but for rounding."""
    vectors = []
    for name, table in (("as it was", trained.table), ("other units", _in_units(trained.table, factor, shift))):
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(table, folder / "events.parquet")
        with RunFolder.claim(folder / "run", "train", {}) as run:
            train_run(run, folder / "events.parquet", _config(trained, epochs=1), 0, Ranks(), tuned=False)
        model, config, vocabulary, _ = load_model(folder / "run")
        log = build_events(pq.read_table(folder / "events.parquet"), config.columns, vocabulary)
        vectors.append(make_vectors(model, log.latest(3)).vectors)
    assert vectors[0].std() > 0.1
    np.testing.assert_allclose(vectors[1], vectors[0], rtol=0, atol=2e-3)


def _in_units(table, factor, shift):
    profile = np.asarray(table["profile"].combine_chunks().flatten()).astype(np.float64) * factor + shift
    column = pa.FixedSizeListArray.from_arrays(pa.array(profile), 4)
    return table.set_column(table.column_names.index("profile"), "profile", column)
