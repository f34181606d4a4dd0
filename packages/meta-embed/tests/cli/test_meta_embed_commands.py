"""Every command as a user runs it: what it prints and leaves behind, and for bad input one line and exit code 2."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from meta_embed.cli import main
from meta_embed.evidence.generator import make_world

CONFIG = """
columns:
  entity: member
  time: time
  label: clicked
  row: [{name: item}]
  member: [{name: profile, kind: dense, width: 4}]
model: {width: 4, hidden: 0, member_hidden: 0}
episodes: {tasks: 32, support: 8, query: 8}
train: {epochs: 2, warm_epochs: 2, tested: 0.3}
"""


@pytest.fixture
def run(capsys):
    """Run a command; its standard output, or with another exit code the one line of standard error."""

    def call(*arguments, code=0):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert end.value.code == code, (out, err)
        if code == 0:
            return json.loads(out) if "--json" in arguments else out
        assert err.startswith("Error: "), err
        assert err.count("\n") == 1, err
        assert not out
        return err.removeprefix("Error: ").strip()

    return call


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Events of 80 members in two files, later ones beside them, and a finished run."""
    folder = tmp_path_factory.mktemp("commands")
    table = make_world(80, items=20, d=3, longest=30, least=16, seed=2).table
    middle = table["time"].to_numpy().mean()
    early, late = table.filter(pc.less(table["time"], middle)), table.filter(pc.greater_equal(table["time"], middle))
    (folder / "events").mkdir()
    pq.write_table(early.slice(0, 700), folder / "events" / "a.parquet")
    pq.write_table(early.slice(700), folder / "events" / "b.parquet")
    (folder / "new").mkdir()
    pq.write_table(late, folder / "new" / "c.parquet")
    pq.write_table(table, folder / "all.parquet")
    (folder / "c.yaml").write_text(CONFIG)
    main(["train", str(folder / "all.parquet"), "-c", str(folder / "c.yaml"), "-o", str(folder / "run"), "--no-tune"],
         standalone_mode=False)  # fmt: skip
    return folder


def test_the_thread_from_events_to_a_report(run, place, tmp_path):
    again = run("train", place / "all.parquet", "-c", place / "c.yaml", "-o", place / "run", "--no-tune", "--json")
    assert set(again) >= {"version", "members", "best_epoch", "held_back_loss"}
    made = run("generate", place / "run", "--events", place / "events", "--store", tmp_path / "v", "--json")
    assert made["version"] == again["version"]
    assert not list(tmp_path.rglob("*.partial*"))
    first = run("refresh", place / "run", "--events", place / "new", "--store", tmp_path / "v", "--json")
    assert first["members"] > 0
    second = run("refresh", place / "run", "--events", place / "new", "--store", tmp_path / "v", "--json")
    assert second == first | {"members": 0, "new": 0}  # delivered twice
    whole = run("generate", place / "run", "--events", place / "all.parquet", "--store", tmp_path / "w", "--json")
    bench = run("bench", "--store", tmp_path / "v", "--batches", "1,16", "--rounds", 10, "--json")
    assert bench["members"] == whole["members"] == 80
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in bench["rows"])
    exported = run("export", place / "run", "-o", tmp_path / "g.pt2", "--json")
    assert exported["max_diff"] <= 1e-6
    program = torch.export.load(tmp_path / "g.pt2").module()
    assert program(torch.zeros(5, 1, dtype=torch.int64), torch.zeros(5, 0), torch.zeros(5, 4)).shape == (5,)


@pytest.mark.parametrize("options", [("--by-activity",), ("--start", 8)])
def test_evaluate(run, place, tmp_path, options):
    picture = tmp_path / "gain.png"
    found = run("evaluate", place / "run", *options, "--baselines", "none", "--query", 8, "--plot", picture, "--json")
    assert found["rows"]
    assert all(set(row) >= {"members", "none_auc", "ours_auc", "ours_logloss"} for row in found["rows"])
    assert picture.stat().st_size > 5000


def test_a_hybrid_is_the_model_alone_where_nobody_has_events_and_both_where_they_have(run, place):
    found = run("evaluate", place / "run", "--baselines", "id,hybrid", "--query", 8, "--start", 8, "--json")
    first, *rest = found["rows"]
    assert first["support"] == 0
    assert first["hybrid_logloss"] == first["ours_logloss"]
    for row in rest:
        # the mean of two logits loses no more than the mean of their losses, whatever the weights
        assert row["hybrid_logloss"] <= max(row["ours_logloss"], row["id_logloss"]) + 1e-9
        assert row["hybrid_logloss"] not in (row["ours_logloss"], row["id_logloss"])


@pytest.mark.parametrize("kind", ["sqlite", "parquet"])
def test_other_stores_by_address(run, place, tmp_path, kind):
    store = f"{kind}:{tmp_path / 'v'}"
    run("generate", place / "run", "--events", place / "events", "--store", store, "--precision", "diagonal")
    assert (tmp_path / "v" / f"store.{kind}").is_file()
    text = run("refresh", place / "run", "--events", place / "new", "--store", store)
    assert "members changed" in text


def _with(place, folder, change):
    """The configuration with one line replaced."""
    old, new = change
    assert old in CONFIG
    path = folder / "changed.yaml"
    path.write_text(CONFIG.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("item}", "itme}"), "the schema names the missing column itme"),
        (("width: 4, hidden", "width: 40, hidden"), "width: expected 2 to 32, got 40"),
        (("width: 4, hidden", "wdith: 4, hidden"), "wdith"),
        (("label: clicked", "label: time"), "column time has two roles"),
        (("epochs: 2, w", "epochs: -2, w"), "expected epochs"),
        (("support: 8", "support: -8"), "episodes: expected"),
        (("columns:", "columns: ["), "changed.yaml"),
        (("tested: 0.3", "tested: 0.9"), "sum to less than one"),
    ],
)
def test_bad_configurations(run, place, tmp_path, change, message):
    config = _with(place, tmp_path, change)
    assert message in run("train", place / "all.parquet", "-c", config, "-o", tmp_path / "r", code=2)
    assert not (tmp_path / "r" / "model.json").exists()


def test_bad_events(run, place, tmp_path):
    table = pq.read_table(place / "all.parquet")
    broken = {
        "keys.parquet": (
            "member",
            pa.array([float(k) for k in table["member"].to_pylist()]),
            "member: expected integer",
        ),
        "nan.parquet": ("time", pa.array([float("nan")] * table.num_rows), "time: expected finite numbers"),
        "label.parquet": ("clicked", pa.array([2.0] * table.num_rows), "clicked: expected labels in [0, 1], got 2"),
    }
    for name, (column, values, message) in broken.items():
        pq.write_table(table.set_column(table.column_names.index(column), column, values), tmp_path / name)
        line = run("train", tmp_path / name, "-c", place / "c.yaml", "-o", tmp_path / "r", "--overwrite", code=2)
        assert message in line
        store = tmp_path / "v"
        line = run("generate", place / "run", "--events", tmp_path / name, "--store", store, "--overwrite", code=2)
        assert message in line
        assert not (store / "store.lmdb").exists()
    (tmp_path / "text.parquet").write_text("member,time,clicked")
    assert "text.parquet" in run(
        "train", tmp_path / "text.parquet", "-c", place / "c.yaml", "-o", tmp_path / "q", code=2
    )
    pq.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    assert "found no row" in run(
        "train", tmp_path / "none.parquet", "-c", place / "c.yaml", "-o", tmp_path / "e", code=2
    )


def test_keys_as_text_do_not_enter_a_store_of_integers(run, place, tmp_path):
    table = pq.read_table(place / "new" / "c.parquet")
    named = table.set_column(0, "member", pa.array([str(k) for k in table["member"].to_pylist()]))
    pq.write_table(named, tmp_path / "named.parquet")
    run("generate", place / "run", "--events", place / "events", "--store", tmp_path / "v")
    before = (tmp_path / "v" / "store.lmdb").read_bytes()
    line = run("refresh", place / "run", "--events", tmp_path / "named.parquet", "--store", tmp_path / "v", code=2)
    assert "entity: this store has integer keys" in line
    assert (tmp_path / "v" / "store.lmdb").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "{0}"), "expected the folder of a finished `meta-embed train`"),
        (("evaluate", "{0}/run", "--baselines", "none,mode"), "baselines: expected different ones"),
        (("evaluate", "{0}/run", "--plot", "gain.docx"), "docx"),
        (("evaluate", "{0}/run", "--events", "{0}/absent"), "absent"),
        (("export", "{0}"), "finished `meta-embed train`"),
        (("generate", "{0}", "--events", "{0}/events", "--store", "{1}/v"), "finished `meta-embed train`"),
        (("generate", "{0}/run", "--events", "{0}/absent", "--store", "{1}/v"), "absent"),
        (("generate", "{0}/run", "--events", "{0}/events", "--store", "feast:v"), "got kind feast"),
        (("refresh", "{0}/run", "--events", "{0}/new", "--store", "{1}/v"), "store.lmdb"),
        (("bench", "--store", "{1}/v"), "store.lmdb"),
        (("bench", "--store", "{1}/v", "--batches", "1,x"), "batches: expected comma-separated integers"),
        (("bench", "--store", "redis://127.0.0.1:1/0"), "redis://127.0.0.1:1/0"),
        (("serve", "{0}/run", "--store", "{1}/v"), "store.lmdb"),
        (("train", "{0}/absent", "-c", "{0}/c.yaml", "-o", "{1}/r"), "absent"),
        (("train", "{0}/all.parquet", "-c", "{0}/absent.yaml", "-o", "{1}/r"), "absent.yaml"),
        (("train", "{0}/all.parquet", "-c", "{0}/c.yaml", "-o", "{0}/run", "--seed", "9"), "seed: 0 then, 9 now"),
    ],
)
def test_bad_input_is_one_line(run, place, tmp_path, arguments, message):
    assert message in run(*(a.format(place, tmp_path) for a in arguments), code=2)


def test_a_store_of_another_model_is_neither_refreshed_nor_served(run, place, tmp_path):
    other = _with(place, tmp_path, ("epochs: 2, w", "epochs: 1, w"))
    run("train", place / "all.parquet", "-c", other, "-o", tmp_path / "r", "--no-tune")
    run("generate", place / "run", "--events", place / "events", "--store", tmp_path / "v")
    for command in (("refresh", tmp_path / "r", "--events", place / "new"), ("serve", tmp_path / "r")):
        assert "generate anew, or allow stale vectors" in run(*command, "--store", tmp_path / "v", code=2)


def test_a_store_that_is_being_written_is_refused(run, place, tmp_path):
    from meta_embed.store.address import open_store

    for kind in ("lmdb", "sqlite", "parquet"):
        store = f"{kind}:{tmp_path / kind}"
        run("generate", place / "run", "--events", place / "events", "--store", store)
        with open_store(store, writer=True):
            for command in ("refresh", "generate"):
                line = run(command, place / "run", "--events", place / "new", "--store", store, code=2)
                assert "held by another writer" in line


def test_the_command_line_starts_without_torch():
    code = "import sys, meta_embed.cli; assert not {'torch', 'pyarrow', 'numpy', 'lmdb'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_demo(run, tmp_path, monkeypatch):
    """The whole command on few members; the demo's figures at its real size are those of the evidence."""
    from meta_embed.evidence import demo

    original = demo.run_demo
    monkeypatch.setattr(demo, "run_demo", lambda members, seed, say: original(members // 40, seed, say))
    found = run("demo", "--quick", "-o", tmp_path / "demo.png", "--json")
    assert (tmp_path / "demo.png").stat().st_size > 5000
    assert found["refresh_vs_full_max_diff"] == 0.0
    assert found["unknown_member_is_cold"]
