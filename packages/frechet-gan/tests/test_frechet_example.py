"""The example and the demonstrations run; the alarm tells a gamed encoder from an honest generator."""

import json
import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner
from frechet_gan.cli import main
from PIL import Image

pytest.importorskip("sklearn")


def test_own_loop(capsys):
    path = Path(__file__).parents[1] / "examples" / "own_loop.py"
    if not path.exists():
        pytest.skip("the examples are not part of the wheel")
    result = runpy.run_path(str(path))["main"](steps=150)
    assert result["distance"] < 60  # noise is at several hundred
    assert "precision, recall" in capsys.readouterr().out


@pytest.mark.slow
def test_hacking_raises_the_alarm_for_the_gamed_encoder_only(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "hacking.png"
    result = CliRunner().invoke(main, ["demo", "hacking", "--out", str(picture), "--steps", "300", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["gamed_seen_fd"] < 0.5 * found["gamed_heldout_fd"]
    assert any(a.startswith("hacking:") for a in found["gamed_alarms"])
    assert not any(a.startswith("hacking:") for a in found["honest_alarms"])
    assert found["honest_heldout_fd"] < found["gamed_heldout_fd"]
    with Image.open(picture) as image:
        assert image.size[0] > 800


def test_demo_compares_two_losses(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "digits.png"
    result = CliRunner().invoke(main, ["demo", "--out", str(picture), "--seconds", "0.5", "--seeds", "1", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {"frechet_fd", "ns_fd", "ratio", "real_halves_fd"} <= found.keys()
    assert picture.exists()
