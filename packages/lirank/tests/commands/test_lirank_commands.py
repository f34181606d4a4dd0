import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from core_tensor.app.cli import is_bad_input
from lirank.cli import main


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if code == 2 and result.exception and not isinstance(result.exception, SystemExit):
        assert is_bad_input(result.exception), result.exception  # what the shell turns into one line
    else:
        assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_table, schema_text):
    """A log, its schema and a finished run."""
    path = tmp_path_factory.mktemp("commands")
    pq.write_table(make_table(2000), path / "log.parquet", row_group_size=500)
    later = make_table(400, seed=3)
    times = pa.array([t + 10**6 for t in later["time"].to_pylist()])
    pq.write_table(later.set_column(0, "time", times), path / "later.parquet")
    (path / "schema.yaml").write_text(schema_text)
    (path / "model.yaml").write_text("dim: 8\nwidths: [16, 8]\ncross_rank: 8\nhistory_width: 8\n")
    run(*train(path), "-o", path / "run")
    return path


def train(path):
    return (
        *("train", path / "log.parquet", "--schema", path / "schema.yaml", "--model", path / "model.yaml"),
        *("--epochs", 2, "--batch-size", 128),
    )


def test_the_thread_from_log_to_model(folder):
    drafted = run("schema", "infer", folder / "log.parquet", "--label", "click").output
    assert "kind: id" in drafted
    assert (
        "2000 rows fit the schema"
        in run("schema", "check", folder / "log.parquet", "--schema", folder / "schema.yaml").output
    )
    again = json.loads(run(*train(folder), "-o", folder / "run", "--json").stdout)  # a finished run is not done again
    assert again["rows"] == {"train": 1600, "valid": 200, "test": 200}
    found = json.loads(run("evaluate", folder / "run", "--intervals", "--json").stdout)["labels"]["click"]
    assert found["auc"] == again["test"]["click"]["auc"]
    assert found["auc_low"] < found["auc"] < found["auc_high"]
    later = run("evaluate", folder / "run", folder / "later.parquet", "--by", "city", "--against", folder / "run")
    assert "city = 3" in later.output
    assert "| click | auc     | 0 " in later.output
    assert "LightGBM" in run("baseline", folder / "log.parquet", "--schema", folder / "schema.yaml").output
    calibrated = run("calibrate", folder / "run", folder / "later.parquet", "-o", folder / "calibrated", "--json")
    assert set(json.loads(calibrated.stdout)) == {"click", "like"}
    assert "times smaller" in run("compress", folder / "run", "-o", folder / "table.safetensors").output
    options = ("-o", folder / "model.onnx", "--table", "float32", "--json")  # 8-bit tables: tests/serve
    exported = json.loads(run("export", folder / "calibrated", *options).stdout)
    assert exported["max_difference"] <= 1e-5
    assert "512" in run("bench", folder / "calibrated", "--onnx", folder / "model.onnx", "--repeats", 10).output


def test_a_run_goes_on_from_another(folder):
    schema = (folder / "schema.yaml").read_text() + "- {kind: id, name: kind, column: position2, rows: 64}\n"
    (folder / "grown.yaml").write_text(schema)
    table = pq.read_table(folder / "later.parquet")
    pq.write_table(table.append_column("position2", table["position"]), folder / "grown.parquet")
    options = ("--from", folder / "run", "--epochs", 1, "--batch-size", 128, "--json")
    arguments = ("train", folder / "grown.parquet", "--schema", folder / "grown.yaml", *options)
    found = json.loads(run(*arguments, "-o", folder / "next").stdout)
    assert sum(found["rows"].values()) == 400
    assert found["before"]["click"]["rows"] == found["test"]["click"]["rows"] == found["rows"]["test"]
    assert (folder / "next" / "curvature.safetensors").exists()
    evicted = json.loads(
        run("evict", folder / "next", "-o", folder / "small", "--unseen-for", 5, "--keep", "item=10", "--json").stdout
    )
    assert evicted["features"]["item"]["rows_used"] == 10
    assert evicted["causal"] > 0  # the first log lies more than five days before the end
    run("evict", folder / "next", "-o", folder / "none", code=2)
    run("evict", folder / "next", "-o", folder / "none", "--keep", "item", code=2)
    run("evict", folder / "next", "-o", folder / "none", "--keep", "user=5", code=2)
    # the same log once more: everything in it was consumed
    run("train", folder / "grown.parquet", "--from", folder / "next", "-o", folder / "again", code=2)
    run("train", folder / "grown.parquet", "-o", folder / "again", code=2)
    run("train", folder / "grown.parquet", *options, "--cold-weight", 0.5, "-o", folder / "again", code=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "{0}/log.parquet", "--schema", "{0}/schema.yaml", "-o", "{0}/run"),  # another configuration
        ("train", "{0}/log.parquet", "--schema", "{0}/model.yaml", "-o", "{0}/x"),
        ("train", "{0}/schema.yaml", "--schema", "{0}/schema.yaml", "-o", "{0}/x"),
        ("train", "{0}/log.parquet", "--schema", "{0}/schema.yaml", "-o", "{0}/x", "--split", "user"),
        ("evaluate", "{0}"),
        ("evaluate", "{0}/run", "{0}/log.parquet"),  # rows from before the end of the training
        ("export", "{0}/run", "-o", "{0}/model.txt"),
        ("calibrate", "{0}/run", "{0}/log.parquet", "-o", "{0}/y"),
        ("schema", "infer", "{0}/log.parquet", "--label", "absent"),
    ],
)
def test_bad_input_is_one_line(folder, arguments):
    run(*(a.format(folder) for a in arguments), code=2)


def test_the_command_line_starts_without_torch():
    code = "import sys, lirank.cli; assert not {'torch', 'pyarrow', 'numpy'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_demo(tmp_path):
    found = json.loads(run("demo", "--quick", "-o", tmp_path / "d", "--json").stdout)
    models = {row["model"]: row for row in found["models"]}
    assert models["truth (Bayes)"]["auc"] > models["lirank"]["auc"] > models["logistic regression"]["auc"]
    assert found["export_max_difference"] < 1e-5
    assert (tmp_path / "d" / "reliability.png").stat().st_size > 5000
