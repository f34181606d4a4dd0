import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_embed.cli import main
from meta_embed.generate import job as job_module
from meta_embed.generate.job import GenerateOptions, generate
from meta_embed.generate.refresh import refresh
from meta_embed.serve.lookup import Lookup
from meta_embed.store.address import open_store
from meta_embed.store.codec import StoreInfo
from meta_embed.tasks.ragged import task_batch

OPTIONS = GenerateOptions(codec="float32", precision="full", buckets=5)


def _make(trained, store, work, options=OPTIONS, events=None, ranks=None):
    arguments = {} if ranks is None else {"ranks": ranks}
    return generate(*trained.job(), events or trained.parquet, str(store), work, options, **arguments)


def test_every_member_gets_the_vector_of_its_latest_events(trained, tmp_path):
    result = _make(trained, tmp_path / "v", tmp_path / "w")
    assert result["members"] == len(trained.events)
    latest = trained.events.latest(8)
    support, none = (latest.offsets[:-1], latest.counts), (np.zeros(len(latest), np.int64),) * 2
    model = trained.model()
    batch = task_batch(latest, np.arange(len(latest)), support, none)
    e, H = model.adapt(batch.member_ids, batch.member_dense, batch.support)
    with open_store(tmp_path / "v") as store:
        found = Lookup(store, trained.version)(trained.events.keys.tolist())
    assert found.known.all()
    assert np.array_equal(found.vectors, e.detach().numpy())
    upper = np.triu_indices(model.width)
    assert np.array_equal(found.precisions, H.detach().numpy()[:, *upper])
    assert np.array_equal(found.counts, latest.counts)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("kind", ["lmdb", "sqlite", "parquet"])
def test_killed_and_resumed_is_byte_identical(trained, tmp_path, kind, monkeypatch):
    _make(trained, f"{kind}:{tmp_path / 'whole'}", tmp_path / "w1")
    original, made = job_module._write_part, []

    def dies(path, *rest):
        if len(made) == 3 and "resumed" not in os.environ.get("STATE", ""):
            raise KeyboardInterrupt
        made.append(path.name)
        original(path, *rest)

    monkeypatch.setattr(job_module, "_write_part", dies)
    with pytest.raises(KeyboardInterrupt):
        _make(trained, f"{kind}:{tmp_path / 'v'}", tmp_path / "w2")
    monkeypatch.setenv("STATE", "resumed")
    _make(trained, f"{kind}:{tmp_path / 'v'}", tmp_path / "w2")
    assert len(made) == len(set(made)) == 5  # nothing was done twice
    name = f"store.{kind}"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "v" / name).read_bytes()


DIES = """
import os, signal, sys
from meta_embed.cli import main
from meta_embed.generate import job
original = job._write_part
def dies(path, *rest):
    if path.name == "part-6.parquet":
        os.kill(os.getpid(), signal.SIGKILL)
    original(path, *rest)
job._write_part = dies
main(sys.argv[1:])
"""


def test_killed_by_a_signal_and_resumed_by_the_same_command(trained, tmp_path):
    arguments = ["generate", str(trained.run), "--events", str(trained.parquet), "--buckets", "12", "--store"]
    main([*arguments, str(tmp_path / "whole")], standalone_mode=False)
    killed = subprocess.run([sys.executable, "-c", DIES, *arguments, str(tmp_path / "v")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "v" / "store.lmdb").exists()
    assert len(list((tmp_path / "v").rglob("part-*.parquet"))) == 6
    main([*arguments, str(tmp_path / "v")], standalone_mode=False)
    assert (tmp_path / "whole/store.lmdb").read_bytes() == (tmp_path / "v/store.lmdb").read_bytes()
    assert not list((tmp_path / "v").rglob("part-*")) + list((tmp_path / "v").rglob(".partial*"))


def _bytes(trained, tmp_path, name, table):
    pq.write_table(table, tmp_path / f"{name}.parquet")
    _make(trained, tmp_path / name, tmp_path / "w", events=tmp_path / f"{name}.parquet")


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.booleans())
def test_refresh_equals_full_generation_in_any_order_and_delivered_twice(trained, seed, pieces, twice):
    import tempfile
    from pathlib import Path

    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        early = rng.random(trained.table.num_rows) < 0.5
        early[0] = True
        _bytes(trained, folder, "v", trained.table.filter(pa.array(early)))
        _bytes(trained, folder, "full", trained.table)
        late = rng.permutation(np.flatnonzero(~early))
        parts = [trained.table.take(pa.array(p)) for p in np.array_split(late, pieces)]
        with open_store(folder / "v", writer=True) as store:
            refresh(*trained.job(), iter(parts * 2 if twice else parts), store)
            again = refresh(*trained.job(), iter([trained.table]), store)
            assert again["members"] == again["new"] == 0  # all of it had been delivered
            refreshed = list(store.items())
        with open_store(folder / "full") as store:
            assert list(store.items()) == refreshed  # to the last bit


def test_new_members_leave_everyone_else_unchanged(trained, tmp_path):
    """lightfm #347: a new member should need no retraining, and move nobody."""
    old = trained.table.filter(pa.compute.less(trained.table["member"], 100))
    _bytes(trained, tmp_path, "v", old)
    with open_store(tmp_path / "v") as store:
        before = dict(store.members())
    new = trained.table.filter(pa.compute.greater_equal(trained.table["member"], 100))
    with open_store(tmp_path / "v", writer=True) as store:
        result = refresh(*trained.job(), iter([new]), store)
        after = dict(store.members())
    assert result["new"] == result["members"] == 20
    assert {k: v for k, v in after.items() if k < 100} == before
    assert len(after) == 120


def test_events_after_the_time_and_labels_known_later_are_left_out(trained, tmp_path):
    middle = float(np.median(trained.events.time))
    options = GenerateOptions(codec="float32", as_of=middle, buckets=3)
    _make(trained, tmp_path / "v", tmp_path / "w", options)
    kept = trained.table.filter(pa.compute.less_equal(trained.table["time"], middle))
    pq.write_table(kept, tmp_path / "kept.parquet")
    _make(
        trained, tmp_path / "k", tmp_path / "w", GenerateOptions(codec="float32", buckets=3), tmp_path / "kept.parquet"
    )
    with open_store(tmp_path / "v") as store, open_store(tmp_path / "k") as other:
        assert list(store.items()) == list(other.items())
        assert store.info.as_of <= middle


def test_refusals_of_refresh(trained, tmp_path):
    _make(trained, tmp_path / "v", tmp_path / "w", GenerateOptions(history=False))
    model, config, vocabulary, version = trained.job()
    with open_store(tmp_path / "v", writer=True) as store:
        with pytest.raises(ValueError, match="keeps no events of its members"):
            refresh(model, config, vocabulary, version, iter([trained.table]), store)
        with pytest.raises(ValueError, match="model version"):
            refresh(model, config, vocabulary, "other", iter([trained.table]), store)
    _make(trained, tmp_path / "v", tmp_path / "w")
    named = trained.table.set_column(0, "member", pa.array([str(k) for k in trained.table["member"].to_pylist()]))
    with open_store(tmp_path / "v", writer=True) as store:
        with pytest.raises(TypeError, match="entity: this store has integer keys"):
            refresh(model, config, vocabulary, version, iter([named]), store)
        assert isinstance(store.info, StoreInfo)
    with pytest.raises(ValueError, match="buckets: expected at least 1"):
        GenerateOptions(buckets=0)


def test_precisions_of_a_model_without_posterior_are_refused(trained, tmp_path):
    import msgspec
    from meta_embed.model.build import build_model

    config = msgspec.structs.replace(trained.config, model=msgspec.structs.replace(trained.config.model, method="maml"))
    model = build_model(config, trained.vocabulary)
    with pytest.raises(ValueError, match="this model gives no posterior"):
        generate(model, config, trained.vocabulary, "v", trained.parquet, str(tmp_path / "v"), tmp_path / "w", OPTIONS)
    generate(model, config, trained.vocabulary, "v", trained.parquet, str(tmp_path / "v"), tmp_path / "w2")
    with open_store(tmp_path / "v") as store:
        assert len(store) == 120
