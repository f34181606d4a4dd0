"""The commands, from end to end on few epochs."""

import json
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from core_tensor.dev.testing import shared_data
from msam.cli import main
from msam.study import compare, plots
from msam.study.data import digits, load, noisy
from msam.study.portrait import draw_portrait
from msam.study.training import Run


@pytest.mark.slow
def test_demo_writes_a_picture(tmp_path):
    picture = tmp_path / "demo.png"
    result = CliRunner().invoke(main, ["demo", "--quick", "-o", str(picture), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(told["test_accuracy"]) == {"sgd", "sam", "msam-sequential", "msam"}
    assert min(told["test_accuracy"].values()) > 70
    assert abs(told["test_accuracy"]["msam"] - told["test_accuracy"]["msam-sequential"]) < 1


@pytest.mark.slow
def test_compare_writes_every_run(tmp_path):
    out = tmp_path / "runs"
    arguments = ["compare", "--seeds", "2", "--epochs", "1", "--methods", "sgd,half,chained", "--out", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    saved = json.loads((out / "runs.json").read_text())
    assert [row["method"] for row in saved["rows"]] == ["sgd", "half", "chained"]
    assert len(saved["runs"]) == 6
    assert saved["rows"][0]["difference"] == 0.0


@pytest.mark.slow
def test_sweep_goes_on_from_its_file_and_draws(tmp_path, monkeypatch):
    out, plot = tmp_path / "sweep", tmp_path / "sweep.png"
    arguments = ["sweep", "--seeds", "1", "--epochs", "1", "--rho", "0.05,0.2", "--micro-batches", "1,4"]
    arguments += ["--out", str(out), "--plot", str(plot), "--json"]
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout.splitlines()[-1])
    assert [(row["m"], row["rho"]) for row in told["rows"]] == [(1, 0.05), (1, 0.2), (4, 0.05), (4, 0.2)]
    assert plot.read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "runs.json").read_text())
    lost = list(saved["runs"])[-1]
    del saved["runs"][lost]  # as if it had been killed before the last run
    (out / "runs.json").write_text(json.dumps(saved))
    trained = []
    train = compare.train
    monkeypatch.setattr(compare, "train", lambda *a, **k: trained.append(a[1]) or train(*a, **k))
    again = CliRunner().invoke(main, arguments)
    assert trained == ["msam"]
    assert [row["test"] for row in json.loads(again.stdout.splitlines()[-1])["rows"]] == [
        row["test"] for row in told["rows"]
    ]
    other = CliRunner().invoke(main, [*arguments, "--epochs", "2"])
    assert other.exit_code == 2
    assert "epochs: 1 then, 2 now" in other.output
    assert other.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["compare", "--plot"], ["sweep", "--plot"], ["cost", "--plot"], ["demo", "--out"], ["demo", "--portrait"]],
    ids=" ".join,
)
def test_a_picture_of_no_known_kind_is_refused_before_any_work(tmp_path, monkeypatch, arguments):
    monkeypatch.setattr("msam.study.compare.train", None)
    monkeypatch.setattr("msam.study.cost.ratios", None)
    result = CliRunner().invoke(main, [*arguments, str(tmp_path / "picture.foo")])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {tmp_path / 'picture.foo'}: expected a picture's name, ending in .png")
    assert result.stderr.count("\n") == 1


def test_a_comparison_without_sgd_is_drawn(tmp_path):
    run = Run("sam", 0.1, 1, 0, validation=90.0, test=91.0, train_loss=0.1, step_ms=2.0, lambda_max=3.0, trace=4.0)
    path = tmp_path / "picture.png"
    plots.comparison(compare.summarise([run, replace(run, method="msam")]), {}, path, "two methods")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["mnist", "cifar", "polarity"])
def test_a_folder_without_the_files_is_named(tmp_path, name):
    result = CliRunner().invoke(main, ["compare", "--data", name, "--folder", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: folder: expected the files of {name} there (--folder), got no {tmp_path}")
    assert result.stderr.count("\n") == 1


def test_cost_reports_every_engine(tmp_path):
    plot = tmp_path / "cost.png"
    arguments = ["cost", "--models", "mlp", "--micro-batches", "2,4", "--modes", "ghost,sequential,vmap"]
    result = CliRunner().invoke(main, [*arguments, "--repeats", "1", "--plot", str(plot), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert {(row["mode"], row["m"]) for row in rows} == {
        (k, m) for k in ("ghost", "sequential", "vmap") for m in (2, 4)
    }
    assert all(row["ratio"] > 0 for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_portrait(tmp_path):
    path = tmp_path / "portrait.png"
    draw_portrait(digits(), 0.1, 4, path, epochs=1)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_label_noise_is_wrong_labels_in_the_training_part_only():
    clean = digits()
    dirty = noisy(clean, 0.25, seed=1)
    assert int((clean.train[1] != dirty.train[1]).sum()) == round(0.25 * len(clean.train[1]))
    assert int(dirty.train[1].max()) == 9
    assert dirty.validation is clean.validation
    assert dirty.test is clean.test
    with pytest.raises(ValueError, match="label_noise"):
        noisy(clean, 1.5)


@pytest.mark.parametrize("name", ["mnist", "cifar", "polarity"])
def test_shared_data_sets_load_and_fit_their_models(name):
    """No class is rare, parts are disjoint in size, and the model takes a batch."""
    folders = {"mnist": "mnist", "cifar": "cifar10_subset", "polarity": "nlp_classification"}
    if name == "cifar":
        pytest.importorskip("PIL")
    task = load(name, shared_data(folders[name]).parent)
    for x, y in (task.train, task.validation, task.test):
        assert len(x) == len(y) >= 500
        counts = torch.bincount(y)
        assert float(counts.min()) > 0.5 * float(counts.max())
    classes = int(task.train[1].max()) + 1
    assert task.model()(task.train[0][:4]).shape == (4, classes)


def test_help_loads_no_torch():
    code = "import sys, msam.cli; assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plain_import_loads_no_sharding():
    code = "import sys; from msam import MSAM; assert 'torch.distributed.fsdp' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def _one_run() -> Run:
    return Run("sam", 0.1, 1, 0, validation=90.0, test=91.0, train_loss=0.1, step_ms=2.0, lambda_max=3.0, trace=4.0)


def test_a_run_that_diverged_is_kept_and_told(tmp_path, monkeypatch):
    """JSON has no NaN; a loss that is none must not end hours of runs, nor come back as another number."""
    lost = replace(_one_run(), train_loss=float("nan"), lambda_max=None)
    monkeypatch.setattr(compare, "train", lambda *a, **k: lost)
    job = compare.Job("sam", 0.1, 1, 0)
    compare.Ledger(tmp_path / "runs.json").run(digits(), job)
    monkeypatch.setattr(compare, "train", None)
    again = compare.Ledger(tmp_path / "runs.json").run(digits(), job)
    assert str(again) == str(lost)
    assert compare.summarise([again])[0]["train_loss"] is None


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"runs": []}', '{"runs": {"a": 3}}', '{"runs": {"a": {"rho": 1}}}', '{"runs": {"a": null}}'],
)
def test_a_broken_ledger_is_one_clear_error(tmp_path, content):
    path = tmp_path / "runs.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"runs\.json: expected"):
        compare.Ledger(path)


@pytest.mark.parametrize(
    "arguments",
    [["--out", "/proc/msam"], ["--out", "/dev/full/runs"], ["--plot", "/proc/picture.png"]],
    ids=["read-only folder", "a file as folder", "read-only picture"],
)
def test_what_the_system_refuses_is_one_line(monkeypatch, arguments):
    monkeypatch.setattr("msam.study.compare.train", lambda *a, **k: _one_run())
    result = CliRunner().invoke(main, ["compare", "--methods", "sam", "--seeds", "1", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.splitlines()[-1].count("/") >= 1


def test_a_full_disk_behind_standard_output_is_one_line():
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pathlib.Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "msam", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_other_data_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("msam.study.compare.train", lambda *a, **k: _one_run())
    arguments = ["compare", "--methods", "sam", "--seeds", "1", "--out", str(tmp_path / "runs")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    other = CliRunner().invoke(main, [*arguments, "--label-noise", "0.2"])
    assert other.exit_code == 2
    assert "label_noise: 0.0 then, 0.2 now" in other.stderr
    assert CliRunner().invoke(main, [*arguments, "--label-noise", "0.2", "--overwrite"]).exit_code == 0
