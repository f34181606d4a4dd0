import uuid

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_embed.tasks.encode import build_vocabulary, categories, encode_ids, encode_time, entity_keys, with_scales
from meta_embed.tasks.events import build_events, parquet_files, read_table
from meta_embed.tasks.schema import Feature, Schema

SCHEMA = Schema(
    entity="user", time="at", label="clicked", row=(Feature("item"), Feature("price", "dense")),
    member=(Feature("age", "dense"),),
)  # fmt: skip


def _events(table, schema=SCHEMA):
    return build_events(table, schema, build_vocabulary(table, schema))


def test_rows_are_sorted_by_member_and_time(small_table):
    log = _events(small_table)
    assert log.keys.tolist() == ["a", "b", "c"]
    assert log.offsets.tolist() == [0, 3, 6, 7]
    assert log.time.tolist() == [1, 2, 3, 1, 2, 3, 5]
    assert log.y.tolist() == [1, 0, 1, 1, 0, 1, 0]
    assert log.ids[:, 0].tolist() == [3, 2, 1, 1, 3, 1, 1]  # x, y, z are rows 1 to 3
    assert log.member_dense[:, 0].tolist() == pytest.approx([0.1, 0.5, 0.9])


def test_an_event_delivered_twice_counts_once(small_table):
    once, twice = _events(small_table), _events(pa.concat_tables([small_table, small_table.slice(2, 3)]))
    for name in ("offsets", "time", "event", "y", "ids", "dense"):
        assert np.array_equal(getattr(once, name), getattr(twice, name))


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(7)))
def test_the_order_of_the_file_does_not_matter(order):
    table = pa.table(
        {"user": [1, 2, 1, 2, 3, 1, 1], "at": [1.0, 1, 1, 2, 3, 2, 1], "clicked": [0.0, 1, 1, 0, 1, 0, 0],
         "item": [5, 6, 7, 5, 6, 7, 6], "price": [0.1] * 7, "age": [1.0] * 7}
    )  # fmt: skip
    log, other = _events(table), _events(table.take(list(order)))
    for name in ("keys", "offsets", "time", "event", "y", "ids", "dense"):
        assert np.array_equal(getattr(log, name), getattr(other, name))


def test_an_unknown_category_has_row_zero_and_hashing_takes_text_and_numbers_alike():
    table = pa.table({"item": ["p", "q"]})
    assert encode_ids(table, [Feature("item")], {"item": ["q"]}).tolist() == [[0], [1]]
    hashed = Feature("item", buckets=64)
    numbers, text = pa.table({"item": [7, 8]}), pa.table({"item": ["7", "8"]})
    assert np.array_equal(encode_ids(numbers, [hashed], {}), encode_ids(text, [hashed], {}))


def test_timestamps_are_seconds():
    import datetime as dt

    when = [dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2026, 1, 2, tzinfo=dt.UTC)]
    table = pa.table({"user": [1, 1], "at": when, "clicked": [True, False], "item": [1, 2]})
    log = _events(table, Schema(entity="user", time="at", label="clicked", row=(Feature("item"),)))
    assert np.diff(log.time).tolist() == [86400.0]
    assert log.y.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("column", "values", "kind", "message"),
    [
        ("clicked", [0.0, 2.0], ValueError, r"clicked: expected labels in \[0, 1\], got 2"),
        ("clicked", [0.0, None], ValueError, "clicked: expected a number in every row"),
        ("user", [1.5, 2.5], TypeError, "user: expected integer or string keys, got double"),
        ("user", [1, None], ValueError, "user: expected a key in every row"),
        ("at", [1.0, float("nan")], ValueError, "at: expected finite numbers"),
        ("price", [1.0, float("inf")], ValueError, "price: expected finite numbers"),
        ("price", ["a", "b"], ValueError, "price: expected numbers, got string"),
        ("at", ["2026-01-01", "2026-01-02"], ValueError, "at: expected timestamps, or numbers of seconds, got string"),
        ("user", ["a", ""], ValueError, "user: expected keys of 1 to 511 bytes, got one of 0"),
        ("user", ["a", "b" * 512], ValueError, "user: expected keys of 1 to 511 bytes, got one of 512"),
        ("user", np.asarray([1, 2**63], np.uint64), ValueError, r"user: expected integers below 2\^63"),
        ("item", [0.5, 2.0], ValueError, "item: expected categories as strings or integers, got double with fractions"),
        ("item", [b"a", b"b"], TypeError, "item: expected categories as strings or integers, got binary"),
        ("item", [[1], [2]], TypeError, "item: expected categories as strings or integers, got list"),
    ],
)
def test_bad_columns(column, values, kind, message):
    table = pa.table(
        {"user": [1, 2], "at": [1.0, 2], "clicked": [0.0, 1], "item": [1, 2], "price": [0.1, 0.2], "age": [1.0, 2]}
    )
    table = table.set_column(table.column_names.index(column), column, pa.array(values))
    with pytest.raises(kind, match=message):
        _events(table)


@pytest.fixture
def numbered(small_table):
    items = pc.index_in(small_table["item"], pa.array(["x", "y", "z"])).cast(pa.int64())
    return small_table.set_column(small_table.column_names.index("item"), "item", items)


def _as_other_tools_write(table, tool):
    """The same events with the column types of pandas, polars and DuckDB."""
    at = pa.array((np.asarray(table["at"]) * 1e9).astype(np.int64))
    names = table["user"].combine_chunks()
    kinds = {
        "pandas": (names.dictionary_encode(), at.cast(pa.timestamp("ns")), table["item"].cast(pa.float64())),
        "polars": (names.cast(pa.large_string()), at.cast(pa.timestamp("ns", "Europe/Berlin")),
                   table["item"].cast(pa.int32())),
        "duckdb": (names.cast(pa.string_view()), pa.array(at.to_numpy() // 1000).cast(pa.timestamp("us", "UTC")),
                   table["item"].cast(pa.uint8())),
    }  # fmt: skip
    columns = dict(zip(("user", "at", "item"), kinds[tool], strict=True))
    return pa.table({name: columns.get(name, table[name]) for name in table.column_names})


@pytest.mark.parametrize("tool", ["pandas", "polars", "duckdb"])
def test_the_same_events_from_another_tool_are_the_same_events(numbered, tool):
    vocabulary = build_vocabulary(numbered, SCHEMA)
    other = _as_other_tools_write(numbered, tool)
    assert build_vocabulary(other, SCHEMA) == vocabulary
    one, two = build_events(numbered, SCHEMA, vocabulary), build_events(other, SCHEMA, vocabulary)
    for name in ("keys", "offsets", "time", "event", "ids", "dense"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


def test_files_of_several_tools_are_one_log(numbered, tmp_path):
    for tool in ("pandas", "polars", "duckdb"):
        table = _as_other_tools_write(numbered, tool)
        if pa.types.is_string_view(table["user"].type):  # in memory only; older Arrow writes no such files
            table = table.set_column(table.column_names.index("user"), "user", table["user"].cast(pa.string()))
        pq.write_table(table, tmp_path / f"{tool}.parquet")
    table = read_table(tmp_path, SCHEMA)
    assert table.num_rows == 3 * numbered.num_rows
    vocabulary = build_vocabulary(numbered, SCHEMA)
    # delivered three times, by three tools
    assert len(build_events(table, SCHEMA, vocabulary).time) == len(build_events(numbered, SCHEMA, vocabulary).time)


def test_uuids_are_their_text_and_absent_integers_of_pandas_absent():
    keys = [uuid.UUID(int=i) for i in (5, 9)]
    column = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([k.bytes for k in keys], pa.binary(16)))
    assert entity_keys("user", pa.chunked_array([column])).to_pylist() == [str(k) for k in keys]
    assert categories("item", pa.chunked_array([[7.0, float("nan"), None]])).to_pylist() == [7, None, None]


def test_milliseconds_are_warned_of():
    with pytest.warns(UserWarning, match="at: 1700000000000 seconds since 1970 is thousands of years ahead"):
        encode_time("at", pa.chunked_array([[1_700_000_000_000]]))


def test_a_schema_that_names_a_missing_column_or_one_twice(small_table):
    with pytest.raises(ValueError, match="the schema names the missing column age"):
        build_events(small_table.drop_columns(["age"]), SCHEMA, {"item": []})
    twice = pa.Table.from_arrays([*small_table.columns, small_table["age"]], [*small_table.column_names, "age"])
    with pytest.raises(ValueError, match="expected one column age, got several"):
        build_events(twice, SCHEMA, {"item": []})
    with pytest.raises(ValueError, match="column item has two roles"):
        Schema(entity="user", time="at", label="y", row=(Feature("item"),), member=(Feature("item"),))
    with pytest.raises(ValueError, match="vector and vector_width go together"):
        Schema(entity="user", time="at", label="y", vector="v")


def test_files_with_keys_of_two_kinds_are_refused(tmp_path, small_table):
    pq.write_table(small_table, tmp_path / "a.parquet")
    numbers = small_table.set_column(0, "user", pa.array(range(7)))
    pq.write_table(numbers, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: user: expected string as in the other files, got int64"):
        read_table(tmp_path, SCHEMA)


def test_broken_and_absent_files(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"a\.parquet: expected a Parquet file of events"):
        read_table(tmp_path, SCHEMA)
    with pytest.raises(FileNotFoundError):
        parquet_files(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected Parquet files"):
        parquet_files(tmp_path / "empty")


def test_features_of_a_member_that_change_are_those_of_its_first_event(small_table):
    changed = small_table.set_column(5, "age", pa.array([9.0, 0.1, 0.5, 0.1, 0.9, 0.1, 0.5]))
    with pytest.warns(UserWarning, match="change between its events"):
        log = _events(changed)
    assert log.member_dense[1, 0] == pytest.approx(0.5)


def test_partitioned_files_of_spark(tmp_path, small_table):
    """Columns in the names of folders, empty parts, and files beside them that are no data."""
    for value, rows in (("x", (0, 3)), ("7", (3, 3)), ("__HIVE_DEFAULT_PARTITION__", (6, 1))):
        folder = tmp_path / f"item={value}"
        folder.mkdir()
        part = small_table.drop_columns(["item"]).slice(*rows)
        pq.write_table(part.slice(0, 0), folder / "part-0.parquet")
        pq.write_table(part, folder / "part-1.parquet", use_deprecated_int96_timestamps=True)
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / "a.parquet").write_text("half a file")
    (tmp_path / ".a.parquet").write_text("half a file")
    table = read_table(tmp_path, SCHEMA)
    assert sorted(table["item"].to_pylist(), key=str) == ["7"] * 3 + [None] + ["x"] * 3
    assert sorted(table["at"].to_pylist()) == sorted(small_table["at"].to_pylist())


@pytest.mark.parametrize(("known", "message"), [([1, 2], "integers, as in training, got strings"), ([], "")])
def test_categories_of_another_kind_than_in_training(small_table, known, message):
    if message:
        with pytest.raises(ValueError, match=f"item: expected {message}"):
            build_events(small_table, SCHEMA, {"item": known})
    else:
        assert not build_events(small_table, SCHEMA, {"item": known}).ids.any()


def test_a_constant_number_and_a_ranker_s_own_columns_are_not_scaled(small_table):
    schema = Schema(entity="user", time="at", label="clicked", base="price", row=(Feature("age", "dense"),))
    constant = small_table.set_column(small_table.column_names.index("age"), "age", pa.array([0.3] * 7))
    scaled = with_scales(constant, schema)
    assert scaled.row[0].scale == (1.0,)
    log = build_events(constant, scaled, {})
    assert np.abs(log.dense[:, 1]).max() < 1e-6
    assert sorted(log.dense[:, 0]) == pytest.approx(sorted(small_table["price"].to_pylist()))
    given = Feature("age", "dense", mean=(1.0,), scale=(2.0,))
    assert with_scales(constant, Schema(entity="user", time="at", label="clicked", row=(given,))).row == (given,)
    for bad in ({"mean": (1.0, 2.0)}, {"scale": (0.0,)}, {"scale": (float("nan"),)}):
        with pytest.raises(ValueError, match=r"age: expected (mean|scale)"):
            Feature("age", "dense", **bad)
