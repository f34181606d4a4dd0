import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sgd_stability.cli import main

MODEL = """
import torch


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))


def data():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, torch.arange(20) % 3)
"""


def _run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stability_cli_model.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(20, 4)), y=rng.integers(0, 3, 20))
    return tmp_path


def test_quadratic_prints_json_and_draws(tmp_path):
    picture = tmp_path / "map.png"
    result = _run("quadratic", "--n", 12, "--coherence", 3, "--out", picture, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["thresholds"]
    assert [row["B"] for row in rows] == [1, 2, 4, 8, 12]
    for row in rows:
        assert row["stable_below"] <= row["exact"] * (1 + 1e-9) <= row["unstable_above"] * (1 + 2e-9)
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_analyze_and_map(project):
    result = _run("analyze", "stability_cli_model:build", "data.npz", "--lr", 0.1, "--batch-size", 4, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["n"] == found["analysed"] == 20
    assert found["verdict"]["state"] in {"stable", "unstable"}
    text = _run("analyze", "stability_cli_model:build", "data.npz", "--momentum", 0.9, "--curvature", "ggn")
    assert "most curved samples" in text.stdout
    again = _run(
        "analyze", "stability_cli_model.py:build", "stability_cli_model:data", "--method", "truncated", "--k", 8,
        "--out", "pictures", "--json",
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["n"] == 20
    assert {path.name for path in (project / "pictures").iterdir()} == {"map.png", "curvature.png", "density.png"}
    exact = _run("analyze", "stability_cli_model.py:build", "data.npz", "--out", "pictures")
    assert exact.exit_code == 0, exact.output
    assert (project / "pictures" / "coherence.png").stat().st_size > 10_000
    drawn = _run("map", "stability_cli_model:build", "data.npz", "-o", "out.png", "--json")
    assert drawn.exit_code == 0, drawn.output
    assert (project / "out.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("analyze", "nocolon", "data.npz"), "MODEL: expected package.module:function"),
        (("analyze", "stability_cli_model:missing", "data.npz"), "MODEL: .*missing"),
        (("analyze", "nowhere.py:build", "data.npz"), "MODEL: nowhere.py: no such file"),
        (("analyze", "stability_cli_model:data", "data.npz"), "MODEL: expected .* nn.Module"),
        (("analyze", "stability_cli_model:build", "pickled.npz"), "pickled.npz: .*allow_pickle"),
        (("analyze", "stability_cli_model:build", "absent.npz"), "absent.npz: No such file"),
        (("analyze", "stability_cli_model:build", "data.npz", "--weights", "bad.npz"), "bad.npz: expected safetensors"),
        (("analyze", "stability_cli_model:build", "data.npz", "--lr", "0.1"), "--lr: expected together"),
        (("analyze", "stability_cli_model:build", "bad.npz"), "bad.npz: expected an npz"),
        (("analyze", "stability_cli_model:build", "data.npz", "--loss", "hinge"), "loss: expected one of"),
        (("analyze", "stability_cli_model:build", "data.npz", "--lr", "-1", "--batch-size", "2"), "lr: "),
        (("analyze", "stability_cli_model:build", "data.npz", "--lr", "1", "--batch-size", "21"), "batch_size: "),
        (("quadratic", "--coherence", "0.5"), "sigma: "),
        (("analyze", "stability_cli_model:build", "single.npy"), "single.npy: expected an npz"),
        (("analyze", "stability_cli_model:build", "renamed.npz"), "renamed.npz: .*no array y; it has x, z"),
        (("analyze", "stability_cli_model:build", "text.npz"), "text.npz: expected arrays x and y of numbers"),
        (("analyze", "stability_cli_model:build", "classes.npz"), "targets: expected classes from 0 to 2"),
        (("analyze", "stability_cli_model:build", "wide.npz"), "model: cannot be evaluated on the data"),
        (("analyze", "stability_cli_model:build", "nan.npz"), "model: expected finite outputs"),
        (("analyze", "stability_cli_model:build", "cut.npz"), "cut.npz: expected an npz"),
        (("analyze", "stability_cli_model:build", "data.npz", "--out", "/proc/none"), "/proc/none"),
        (("analyze", "stability_cli_model:build", "data.npz", "--device", "nowhere"), "--device.*torch finds"),
        (("map", "stability_cli_model:build", "data.npz", "--out", "map.txt"), "map.txt: expected a picture's name"),
        (("map", "stability_cli_model:build", "data.npz", "--threads", "0"), "threads"),
        (("demo", "--out", "demo.xyz"), "demo.xyz: expected a picture's name"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(project, arguments, message):
    (project / "bad.npz").write_text("no archive")
    x, y = np.random.default_rng(0).normal(size=(20, 4)), np.arange(20) % 3
    np.savez(project / "pickled.npz", x=np.array([{}], dtype=object), y=np.zeros(1))
    np.save(project / "single.npy", x)
    np.savez(project / "renamed.npz", x=x, z=y)
    np.savez(project / "text.npz", x=x.astype(str), y=y)
    np.savez(project / "classes.npz", x=x, y=y + 1)
    np.savez(project / "wide.npz", x=np.ones((20, 7)), y=y)
    np.savez(project / "nan.npz", x=np.full((20, 4), np.nan), y=y)
    (project / "cut.npz").write_bytes((project / "data.npz").read_bytes()[:-40])
    result = _run(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert "Traceback" not in result.output


def test_the_command_line_loads_no_torch():
    code = "import sys, sgd_stability.cli; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_full_disk_is_one_line(project):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    command = [sys.executable, "-m", "sgd_stability", "quadratic", "--n", "4", "--coherence", "2", "--json"]
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.strip() == "Error: No space left on device"


def test_advise(project):
    result = _run(
        "advise", "stability_cli_model.py:build", "stability_cli_model.py:data", "--optimizer", "adam", "--steps", 40,
        "--batch-size", 4, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["lr"] > 0
    text = _run("advise", "stability_cli_model.py:build", "data.npz", "--steps", 40, "--batch-size", 4)
    assert text.exit_code == 0, text.output
    assert "warmup" in text.stdout
    bad = _run("advise", "stability_cli_model.py:build", "data.npz", "--loss", "hinge")
    assert (bad.exit_code, "loss: expected one of" in bad.stderr) == (2, True)


@pytest.mark.slow
def test_a_float32_dataset_of_the_readme_is_mapped(project):
    result = _run("map", "stability_cli_model.py:build", "stability_cli_model.py:data", "--momentum", 0.9)
    assert result.exit_code == 0, result.output
    assert (project / "map.png").stat().st_size > 10_000


@pytest.mark.slow
def test_demo(tmp_path):
    pytest.importorskip("sklearn")
    picture = tmp_path / "demo.png"
    result = _run("demo", "--out", picture, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["correct"] == found["runs"] == 18
    assert picture.stat().st_size > 10_000
