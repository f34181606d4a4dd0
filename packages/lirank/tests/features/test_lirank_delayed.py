"""Labels that arrive late: every row is trained on once, under its final label."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lirank.data.parquet import ParquetLog
from lirank.data.split import Split
from lirank.features.delayed import ArrivalCurve, settle, stretch
from lirank.features.prepare import Earlier, prepare
from lirank.schema.features import parse_schema

SCHEMA = """
time: {column: t}
labels: [{name: y, arrival: came, window: 100}]
features:
- {kind: id, name: u, rows: 64}
- {kind: popularity, name: p, key: [u], label: y}
"""


def world(rows=1200, seed=0):
    """Events with the time at which their label comes, null for never; some come after the window."""
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(0, 1000, size=rows))
    comes = rng.random(rows) < 0.4
    delay = np.ceil(rng.exponential(40, size=rows)).astype(np.int64)
    return time, rng.integers(9, size=rows), comes, delay


def export(path, now):
    """The log as it is known at a time: only labels that have arrived."""
    time, user, comes, delay = world()
    there = time <= now
    known = (comes & (time + delay <= now))[there]
    came = [int(t) if k else None for t, k in zip((time + delay)[there], known, strict=True)]
    pq.write_table(pa.table({"t": time[there], "u": user[there], "y": known.astype(int), "came": came}), path)
    return ParquetLog.open(path)


def rows(prepared):
    return prepared.log("train").read().__next__()


def test_a_click_that_arrives_after_its_negative_is_trained_once_as_a_click(tmp_path):  # mwt-ds#90
    schema, split = parse_schema(SCHEMA), Split("time", 0.0, 0.0)
    whole = prepare(export(tmp_path / "whole.parquet", 2000), schema, split, tmp_path / "w", now=2000)
    first = prepare(export(tmp_path / "day1.parquet", 500), schema, split, tmp_path / "a", now=500)
    assert first.until == 400
    assert any("wait for their labels" in note for note in first.notes)
    earlier = Earlier(first.encoder(), first.causal(), first.until)
    # the second export holds all rows again, with the labels that have come since
    second = prepare(export(tmp_path / "day2.parquet", 2000), schema, split, tmp_path / "b", earlier=earlier, now=2000)
    assert any("consumed by the earlier run" in note for note in second.notes)
    both = pa.concat_tables([rows(first), rows(second)])
    assert both.drop_columns(["came"]).equals(rows(whole).drop_columns(["came"]))
    _, _, comes, delay = world()
    assert both["y"].to_pylist() == (comes & (delay <= 100)).astype(float).tolist()
    earlier, log = Earlier(second.encoder(), second.causal(), second.until), export(tmp_path / "day3.parquet", 2000)
    with pytest.raises(ValueError, match="no row to train on: 1200 were consumed"):
        prepare(log, schema, split, tmp_path / "c", earlier=earlier, now=2000)


def test_the_time_of_the_export_is_the_latest_time_in_the_log(tmp_path):
    found = stretch(export(tmp_path / "l.parquet", 600), parse_schema(SCHEMA))
    assert (found.now, found.until) == (600, 500)
    pieces = list(found.read(["u", "t"], rows=70))
    assert [p.num_rows for p in pieces[:-1]] == [70] * (len(pieces) - 1)
    assert max(t for p in pieces for t in p["t"].to_pylist()) <= 500


@pytest.mark.parametrize(("came", "message"), [([None, 5], "row 0"), ([3, 1], "row 1 arrives before the row's time")])
def test_arrivals_that_make_no_sense_are_refused(came, message):
    table = pa.table({"t": [2, 4], "u": [1, 2], "y": [1, 1], "came": pa.array(came, pa.int64())})
    with pytest.raises(ValueError, match=message):
        settle(table, parse_schema(SCHEMA), 1.0)


@pytest.mark.parametrize("text", ["arrival: came", "window: 5"])
def test_half_a_description_is_refused(text):
    with pytest.raises(ValueError, match="arrival, window"):
        parse_schema(SCHEMA.replace("arrival: came, window: 100", text))


def test_corrected_targets_have_the_mean_of_the_final_labels():
    rng = np.random.default_rng(0)
    n, window = 400_000, 100.0
    final, delay, age = rng.random(n) < 0.3, rng.exponential(30, n), rng.random(n) * window
    delay = np.minimum(delay, window)
    curve = ArrivalCurve(rng.exponential(30, 20_000).clip(max=window))
    targets = curve.targets((final & (delay <= age)).astype(float), age)
    used = ~np.isnan(targets)
    assert 0.8 < used.mean() < 1.0
    error = targets[used].std() / np.sqrt(used.sum())
    assert abs(targets[used].mean() - 0.3) < 4 * error + 0.005  # the curve itself has an error of a per cent
    naive = (final & (delay <= age))[used].mean()
    assert naive < 0.24
    assert curve.share(np.array([-1.0, window])).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="delays"):
        ArrivalCurve(np.zeros(0))
