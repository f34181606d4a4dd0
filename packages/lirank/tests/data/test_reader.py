import datetime as dt
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lirank.data.infer import doubts, infer_schema
from lirank.data.ordering import in_time_order
from lirank.data.parquet import ParquetLog
from lirank.data.shuffle import windows
from lirank.data.split import TEST, TRAIN, VALID, Split, Splitter
from lirank.schema.features import Dense, Id, Multi, parse_schema


def ids_of(log, batch, epoch, seed, start=0):
    found = []
    for window in windows(log, ["n"], batch, epoch, seed, start, window_batches=4):
        values = np.asarray(window.table["n"])[window.order]
        found += [values[i : i + batch] for i in range(window.start * batch, len(values), batch)]
    return found


@pytest.fixture
def numbers(tmp_path):
    for part in range(3):
        table = pa.table({"n": np.arange(part * 1000, part * 1000 + 1000)})
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=130)
    return ParquetLog.open(tmp_path)


def test_every_row_once_in_an_order_that_repeats(numbers):
    first, again = (np.concatenate(ids_of(numbers, 64, 0, 5)) for _ in range(2))
    assert sorted(first) == list(range(3000))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, np.concatenate(ids_of(numbers, 64, 1, 5)))
    assert not np.array_equal(first, np.concatenate(ids_of(numbers, 64, 0, 6)))
    assert np.array_equal(np.concatenate(ids_of(numbers, 64, 0, None)), np.arange(3000))


@pytest.mark.parametrize("start", [0, 1, 4, 5, 17, 46, 47])
def test_the_order_can_be_entered_at_any_batch(numbers, start):
    everything = ids_of(numbers, 64, 2, 5)
    rest = ids_of(numbers, 64, 2, 5, start)
    assert len(rest) == len(everything) - start
    assert all(np.array_equal(a, b) for a, b in zip(rest, everything[start:], strict=True))


def test_a_huge_row_group_is_read_in_bounded_memory(tmp_path):  # FuxiCTR#124
    n = 2_000_000
    table = pa.table({"n": np.arange(n), "x": np.random.default_rng(0).random(n)})
    pq.write_table(table, tmp_path / "one.parquet", row_group_size=n, use_dictionary=False)
    size = table.nbytes
    del table
    pool = pa.default_memory_pool()
    before, peak, count = pool.bytes_allocated(), 0, 0
    log = ParquetLog.open(tmp_path / "one.parquet")
    for window in windows(log, None, 1024, 0, 1, window_batches=8):
        peak = max(peak, pool.bytes_allocated() - before)
        count += window.table.num_rows
    assert count == n
    assert peak < size / 3


def test_files_as_spark_writes_them(tmp_path):
    for day, city in (("2026-01-01", "a%20b"), ("2026-01-02", "__HIVE_DEFAULT_PARTITION__")):
        folder = tmp_path / f"hour={int(day[-2:])}" / f"city={city}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"n": [int(day[-2:])]}), folder / "part-0.snappy.parquet")
    (tmp_path / "_SUCCESS").write_bytes(b"")
    (tmp_path / "_temporary").mkdir()
    pq.write_table(pa.table({"n": [99]}), tmp_path / "_temporary" / "x.parquet")
    log = ParquetLog.open(tmp_path)
    rows = pa.concat_tables(log.read()).to_pylist()
    assert rows == [{"n": 1, "hour": 1, "city": "a b"}, {"n": 2, "hour": 2, "city": None}]


def test_files_of_polars_duckdb_and_pandas(tmp_path):
    import duckdb
    import pandas as pd
    import polars as pl

    columns = {"u": ["a", "b", None], "i": [1, 2, 3], "x": [0.5, 1.5, 2.5], "l": [[1], [], [2, 3]], "y": [0, 1, 0]}
    pl.DataFrame(columns).write_parquet(tmp_path / "polars.parquet")
    pl.DataFrame(columns).with_columns(pl.col("u").cast(pl.Categorical)).write_parquet(tmp_path / "categorical.parquet")
    pd.DataFrame(columns).to_parquet(tmp_path / "pandas.parquet")
    pd.DataFrame(columns).astype({"u": "category"}).to_parquet(tmp_path / "category.parquet")
    frame = pl.DataFrame(columns)  # noqa: F841 - duckdb reads it by name
    duckdb.sql("select u, i::decimal(18, 0) as i, x, l, y from frame").write_parquet(str(tmp_path / "duckdb.parquet"))
    text = (
        "features: [{kind: id, name: u, type: string, missing: null}, {kind: id, name: i}, {kind: dense, name: x}, "
        "{kind: multi, name: l}]\nlabels: [{name: y}]"
    ).replace("missing: null", 'missing: "null"')
    from lirank.data.batch import Encoder

    batches = []
    for name in ("polars", "categorical", "pandas", "category", "duckdb"):
        encoder = Encoder(parse_schema(text))
        table = pa.concat_tables(ParquetLog.open(tmp_path / f"{name}.parquet").read(["u", "i", "x", "l", "y"]))
        encoder.observe(table)
        batches.append(encoder.encode(table))
    for batch in batches[1:]:
        assert batch.ids.tolist() == batches[0].ids.tolist()
        assert batch.dense.tolist() == batches[0].dense.tolist()
        assert batch.lists["l"].values.tolist() == batches[0].lists["l"].values.tolist()


@pytest.mark.parametrize("how", ["truncated", "foreign", "empty file", "page"])
def test_broken_files_are_named(tmp_path, how):
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"n": np.arange(5000)}), path)
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        raw = raw[: len(raw) // 2]
    elif how == "foreign":
        raw = bytearray(b"not parquet at all")
    elif how == "empty file":
        raw = bytearray()
    else:
        raw[4:400] = b"\xff" * 396
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"log\.parquet"):
        list(ParquetLog.open(path).read())


def test_logs_without_rows_files_or_columns(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        ParquetLog.open(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        ParquetLog.open(tmp_path / "absent")
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="at least one row"):
        ParquetLog.open(tmp_path)
    pq.write_table(pa.table({"n": [1]}), tmp_path / "one.parquet")
    with pytest.raises(ValueError, match=r"'m'.*'n'"):
        ParquetLog.open(tmp_path / "one.parquet").require(["m"])
    pq.write_table(pa.table({"k": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="differs in k, n"):
        ParquetLog.open(tmp_path)


def test_the_digest_follows_the_contents(tmp_path):
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "a.parquet")
    first = ParquetLog.open(tmp_path).digest
    pq.write_table(pa.table({"n": [1, 3]}), tmp_path / "a.parquet")
    assert ParquetLog.open(tmp_path).digest != first


@pytest.mark.parametrize(("run_rows", "rows"), [(1 << 20, 100), (97, 50), (500, 64), (13, 13)])
@pytest.mark.parametrize("span", [3, 40, 10**6])
def test_sorting_in_runs_equals_sorting_at_once(tmp_path, run_rows, rows, span):
    rng = np.random.default_rng(1)
    time = rng.integers(span, size=1000)
    pq.write_table(pa.table({"t": time, "n": np.arange(1000)}), tmp_path / "a.parquet", row_group_size=77)
    log = ParquetLog.open(tmp_path / "a.parquet")
    found = pa.concat_tables(in_time_order(log, ["t", "n"], "t", tmp_path, run_rows, rows))
    order = np.argsort(time, kind="stable")
    assert np.array_equal(np.asarray(found["n"]), order)
    assert list(tmp_path.glob(".sort-*")) == []


def assign(tmp_path, split, n=1000, pieces=(1000,)):
    rng = np.random.default_rng(0)
    table = pa.table({"t": np.sort(rng.integers(300, size=n)), "u": rng.integers(20, size=n), "y": np.zeros(n, int)})
    pq.write_table(table, tmp_path / "s.parquet")
    schema = parse_schema("time: {column: t}\ngroup: u\nfeatures: [{kind: id, name: u}]\nlabels: [{name: y}]")
    splitter = Splitter(ParquetLog.open(tmp_path / "s.parquet"), schema, split)
    ends = np.cumsum([0, *pieces])
    return table, np.concatenate([splitter.assign(table.slice(a, b - a)) for a, b in itertools.pairwise(ends)])


def test_split_by_time(tmp_path):
    table, part = assign(tmp_path, Split())
    t = np.asarray(table["t"])
    assert t[part == TRAIN].max() < t[part == VALID].min()
    assert t[part == VALID].max() < t[part == TEST].min()
    assert 0.07 < (part == TEST).mean() < 0.13


@pytest.mark.parametrize("pieces", [(1000,), (1, 499, 300, 200)])
def test_split_by_user_is_the_last_tenth_of_each(tmp_path, pieces):
    table, part = assign(tmp_path, Split("user", 0.1, 0.2, future=True), pieces=pieces)
    u = np.asarray(table["u"])
    for user in range(20):
        mine = part[u == user]
        assert (np.diff(mine) >= 0).all()
        assert (mine == TEST).sum() == int(len(mine) * 0.2)


def test_random_split_does_not_depend_on_the_pieces(tmp_path):
    found = [assign(tmp_path, Split("random", future=True), pieces=p)[1] for p in ((1000,), (3, 997))]
    assert np.array_equal(*found)
    assert 0.05 < (found[0] == TEST).mean() < 0.15


@pytest.mark.parametrize("kind", ["user", "random"])
def test_a_split_that_lets_the_future_in_is_refused(tmp_path, kind):  # metarank#551, feast#6615
    with pytest.raises(ValueError, match="later events"):
        assign(tmp_path, Split(kind))


def test_inference_of_a_schema(tmp_path, table):
    table = table.append_column("day", pa.array([dt.date(2026, 1, 1)] * len(table)))
    pq.write_table(table, tmp_path / "log.parquet")
    found = infer_schema(ParquetLog.open(tmp_path), ["click"])
    kinds = {feature.name: type(feature) for feature in found.features}
    assert kinds["user"] is Id
    assert kinds["item"] is Id
    assert kinds["tags"] is Multi
    assert kinds["price"] is Dense
    assert found.feature("age").missing == "mean"
    assert "day" not in kinds
    assert "click" not in kinds
    assert (found.time.column, found.group) == ("time", "user")
    assert [doubt.split(":")[0] for doubt in doubts(ParquetLog.open(tmp_path), found)] == ["position", "like"]
    with pytest.raises(ValueError, match="'absent'"):
        infer_schema(ParquetLog.open(tmp_path), ["absent"])
