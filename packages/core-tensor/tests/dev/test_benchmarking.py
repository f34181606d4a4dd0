import json
import sys

import pytest
from core_tensor.dev.benchmarking import Comparison, compare, run_bars


def test_pairs_are_interleaved_and_the_median_ratio_is_taken():
    order = []
    clock_values = iter([0, 1, 1, 3] + [v for t in (0, 10, 20) for v in (t, t + 2, t + 2, t + 8)])
    result = compare(lambda: order.append("a"), lambda: order.append("b"), pairs=3, clock=lambda: next(clock_values))
    assert order == ["a", "b"] * 4
    assert result.speedup == 3.0
    assert result.ratio == pytest.approx(1 / 3)


def test_a_slow_peer_runs_one_pair():
    clock_values = iter([0, 1, 0, 6, 0, 1, 0, 6])
    result = compare(lambda: None, lambda: None, pairs=5, clock=lambda: next(clock_values))
    assert result == Comparison((1,), (6,))


def _missing(quick):
    import no_such_peer  # noqa: F401


def test_a_missing_peer_is_null_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--json"])
    run_bars("core-tensor", {"first": lambda quick: {"first": 2.0 if quick else 1.0}, "second": _missing})
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"first": 2.0, "second": None, "second_reason": "peer not installed: no_such_peer"}


def test_only_runs_the_named_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "first", "--json"])
    run_bars("core-tensor", {"first": lambda quick: {"first": 1}, "second": _missing})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"first": 1}
