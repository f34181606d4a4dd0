import importlib.util
from pathlib import Path

import pytest


def test_new_members_of_a_frozen_ranker(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = Path(__file__).parents[1] / "examples" / "fold_in.py"
    if not path.exists():
        pytest.skip("the examples are not installed with the wheel")
    spec = importlib.util.spec_from_file_location("fold_in", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    areas = example.main(tmp_path / "fold_in.png")
    assert areas[-1] > areas[2] > areas[0]  # more events, better vectors: 32, 4 and none
    assert areas[-1] - areas[0] > 0.02
    assert (tmp_path / "fold_in.png").stat().st_size > 10_000
    assert "32" in capsys.readouterr().out
