"""The example runs."""

import runpy
from pathlib import Path


def test_digits_example(capsys):
    path = Path(__file__).parents[1] / "examples" / "digits.py"
    results = runpy.run_path(str(path))["main"](epochs=6)
    assert set(results) == {"m=1", "m=8"}
    assert min(result["test"] for result in results.values()) > 80
    assert "ghost" in capsys.readouterr().out
