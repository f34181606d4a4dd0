"""The commands, from end to end on few epochs."""

import json

from click.testing import CliRunner
from msam.cli import main


def test_demo_writes_a_picture(tmp_path):
    picture = tmp_path / "demo.png"
    result = CliRunner().invoke(main, ["demo", "--seeds", "1", "--epochs", "6", "--out", str(picture), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(told["test_accuracy"]) == {"sgd", "sam", "msam-sequential", "msam"}
    assert min(told["test_accuracy"].values()) > 70
    assert abs(told["test_accuracy"]["msam"] - told["test_accuracy"]["msam-sequential"]) < 1


def test_compare_writes_every_run(tmp_path):
    out = tmp_path / "runs.json"
    arguments = ["compare", "--seeds", "2", "--epochs", "1", "--methods", "sgd,half,chained", "--out", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    saved = json.loads(out.read_text())
    assert [row["method"] for row in saved["rows"]] == ["sgd", "half", "chained"]
    assert len(saved["runs"]) == 6
    assert saved["rows"][0]["difference"] == 0.0
