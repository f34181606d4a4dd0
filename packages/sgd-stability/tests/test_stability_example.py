"""The example runs."""

import runpy
from pathlib import Path

import pytest


@pytest.mark.slow
def test_digits_monitor_example(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    path = Path(__file__).parents[1] / "examples" / "digits_monitor.py"
    found = runpy.run_path(str(path))["main"](epochs=2)
    assert found["checks"] == 2
    assert found["threshold"] > 0
    assert "largest stable rate" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"digits_history.png", "digits_map.png"}
