import json
import re

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
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
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
    result = _run("quadratic", "--n", 12, "--coherence", 3, "--plot", picture, "--json")
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
        "--pictures", "pictures", "--json",
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["n"] == 20
    assert {path.name for path in (project / "pictures").iterdir()} == {"map.png", "curvature.png", "density.png"}
    exact = _run("analyze", "stability_cli_model.py:build", "data.npz", "--pictures", "pictures")
    assert exact.exit_code == 0, exact.output
    assert (project / "pictures" / "coherence.png").stat().st_size > 10_000
    drawn = _run("map", "stability_cli_model:build", "data.npz", "--plot", "out.png", "--json")
    assert drawn.exit_code == 0, drawn.output
    assert (project / "out.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("analyze", "nocolon", "data.npz"), "MODEL: expected package.module:function"),
        (("analyze", "stability_cli_model:missing", "data.npz"), "MODEL: .*missing"),
        (("analyze", "nowhere.py:build", "data.npz"), "MODEL: nowhere.py: no such file"),
        (("analyze", "stability_cli_model:data", "data.npz"), "MODEL: expected .* nn.Module"),
        (("analyze", "stability_cli_model:build", "pickled.npz"), "DATA: .*pickle"),
        (("analyze", "stability_cli_model:build", "absent.npz"), "DATA: "),
        (("analyze", "stability_cli_model:build", "data.npz", "--weights", "bad.npz"), "--weights: "),
        (("analyze", "stability_cli_model:build", "data.npz", "--lr", "0.1"), "--lr: expected together"),
        (("analyze", "stability_cli_model:build", "bad.npz"), "DATA: expected an npz"),
        (("analyze", "stability_cli_model:build", "data.npz", "--loss", "hinge"), "loss: expected one of"),
        (("analyze", "stability_cli_model:build", "data.npz", "--lr", "-1", "--batch-size", "2"), "lr: "),
        (("analyze", "stability_cli_model:build", "data.npz", "--lr", "1", "--batch-size", "21"), "batch_size: "),
        (("quadratic", "--coherence", "0.5"), "sigma: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(project, arguments, message):
    (project / "bad.npz").write_text("no archive")
    np.savez(project / "pickled.npz", x=np.array([{}], dtype=object), y=np.zeros(1))
    result = _run(*arguments)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1

    assert re.search(message, lines[0])


@pytest.mark.slow
def test_demo(tmp_path):
    pytest.importorskip("sklearn")
    picture = tmp_path / "demo.png"
    result = _run("demo", "--output", picture, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["correct"] == found["runs"] == 18
    assert picture.stat().st_size > 10_000
