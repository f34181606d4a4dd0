"""The example runs and says what it promises."""

import runpy
from pathlib import Path


def test_notifications_example(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "notifications.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert "optimal: value" in text
    assert "verified: True" in text
    assert "mid-week" in text
