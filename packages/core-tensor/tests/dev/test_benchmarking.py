import json
import sys

import pytest
from core_tensor.dev.benchmarking import Comparison, compare, record_bars, run_bars


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


def test_bars_keep_what_a_run_does_not_measure_and_count_the_runs(tmp_path, monkeypatch):
    for name in ("benchmarks", "reproduce/results"):
        (tmp_path / name).mkdir(parents=True)
    bench = tmp_path / "benchmarks" / "bench.py"
    counter = tmp_path / "runs"
    bench.write_text(
        "import json, pathlib, sys\n"
        f"counter = pathlib.Path({str(counter)!r})\n"
        "run = int(counter.read_text()) if counter.exists() else 0\n"
        "counter.write_text(str(run + 1))\n"
        "print('noise')\n"
        "print(json.dumps({'fast': [3.0, 1.0, 2.0][run % 3], 'fast_detail': 7, 'peer': None, 'extra': sys.argv[2:]}))\n"
    )
    limits = {"fast": (">=", 2.0), "slow": ("<=", 1.0), "peer": (">=", 1.0), "other": None}
    script = str(tmp_path / "reproduce" / "bars.py")

    def record(*arguments):
        monkeypatch.setattr(sys, "argv", ["bars.py", *arguments])
        record_bars(script, limits, elsewhere=lambda results: {"other": 5.0}, quick=("fast",))

    record("--runs", "3")
    path = tmp_path / "reproduce" / "results" / "bars.json"
    whole = json.loads(path.read_text())
    rows = {row["bar"]: row for row in whole["table"]}
    assert list(rows) == ["fast", "slow", "peer", "other"]
    assert rows["fast"] == {
        "bar": "fast", "limit": ">= 2", "measured": 2.0, "least": 1.0, "greatest": 3.0, "runs": 3, "met": True,
    }  # fmt: skip
    assert rows["slow"]["measured"] is rows["slow"]["met"] is rows["peer"]["met"] is None
    assert (rows["other"]["limit"], rows["other"]["measured"], rows["other"]["runs"]) == ("reported", 5.0, None)
    whole["bars"]["slow"] = {"measured": 2.0, "least": 2.0, "greatest": 2.0, "runs": 1}
    path.write_text(json.dumps(whole))
    record("--runs", "2")  # 3.0 and 1.0
    rows = {row["bar"]: row for row in json.loads(path.read_text())["table"]}
    assert (rows["fast"]["runs"], rows["fast"]["met"]) == (2, True)
    assert rows["slow"]["met"] is False
    monkeypatch.chdir(tmp_path)
    record("--quick")
    assert int(counter.read_text()) == 6
    assert (tmp_path / "out" / f"{tmp_path.name}-bars-quick" / "bars.json").exists()
