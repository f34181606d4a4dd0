"""Keys and numbers as polars, duckdb and Spark write them, and what is refused because it would be read as another."""

import datetime as dt
import decimal
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from polytope_lp import Columns, Policy, from_arrow, read_problem, solve
from polytope_lp.runs.folders import Source, verify_folder, write_solution
from polytope_lp.tables.scoring import score_file

VALUE, BUDGET = [2.0, 1.0, 3.0, 1.0], [1.0, 1.5]
SOURCE, DESTINATION, BUDGETED = ["b", "b", "a", "c"], ["x", "y", "x", "y"], ["y", "x"]


def _problem(source, destination, budgeted, value=VALUE, budget=BUDGET):
    edges = pa.table({"source": source, "destination": destination, "value": value})
    return from_arrow(edges, pa.table({"destination": budgeted, "budget": budget}))


def _objective(problem):
    return solve(problem, 1e-7).objective


@pytest.fixture(scope="module")
def plain():
    return _objective(_problem(SOURCE, DESTINATION, BUDGETED))


UUIDS = {name: uuid.uuid5(uuid.NAMESPACE_DNS, name) for name in "abcxy"}
DAYS = {name: dt.date(2026, 1, 1 + i) for i, name in enumerate("abcxy")}
TIMES = {name: dt.datetime(2026, 1, 1, i) for i, name in enumerate("abcxy")}
NUMBERS = {name: i for i, name in enumerate("yxabc")}
TYPES = {
    "string_view": lambda names: pa.array(names, pa.string_view()),
    "large_string": lambda names: pa.array(names, pa.large_string()),
    "dictionary": lambda names: pa.array(names).dictionary_encode(),
    "dictionary of views": lambda names: pa.DictionaryArray.from_arrays(
        pa.array(range(len(names)), pa.int8()), pa.array(names, pa.string_view())
    ),
    "uuid text": lambda names: pa.array([str(UUIDS[n]) for n in names]),
    "uuid bytes": lambda names: pa.array([UUIDS[n].bytes for n in names], pa.binary(16)),
    "date": lambda names: pa.array([DAYS[n] for n in names], pa.date32()),
    "timestamp": lambda names: pa.array([TIMES[n] for n in names], pa.timestamp("ns", tz="UTC")),
    "int8": lambda names: pa.array([NUMBERS[n] for n in names], pa.int8()),
    "uint64": lambda names: pa.array([NUMBERS[n] + 7 for n in names], pa.uint64()),
    "decimal": lambda names: pa.array([decimal.Decimal(NUMBERS[n]) for n in names], pa.decimal128(20, 0)),
}


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_every_type_of_key_gives_the_same_problem(plain, kind, tmp_path):
    make = TYPES[kind]
    problem = _problem(make(SOURCE), make(DESTINATION), make(BUDGETED))
    solution = solve(problem, 1e-7)
    assert solution.objective == pytest.approx(plain, rel=1e-6)
    policy = Policy.from_solution(solution)
    policy.save(tmp_path / "policy.npz")
    edges = pa.table({"source": make(SOURCE), "destination": make(DESTINATION), "value": VALUE})
    old = int(pa.__version__.split(".")[0]) < 21
    if kind == "dictionary of views" or (kind == "string_view" and old):
        with pytest.raises(pa.ArrowNotImplementedError):  # nobody has such a file
            pq.write_table(edges, tmp_path / "edges.parquet")
        return
    pq.write_table(edges, tmp_path / "edges.parquet")
    budgets = pa.table({"destination": make(BUDGETED), "budget": BUDGET})
    pq.write_table(budgets, tmp_path / "budgets.parquet")
    scored = score_file(
        Policy.load(tmp_path / "policy.npz"), tmp_path / "edges.parquet", Columns(), tmp_path / "x.parquet"
    )
    assert scored["candidates"] == 4
    assert scored["value"] >= 3.0  # prices alone do not break ties
    source = Source.of(tmp_path / "edges.parquet", tmp_path / "budgets.parquet")
    write_solution(solve(source.problem(), 1e-7), tmp_path / "out", source)
    assert verify_folder(tmp_path / "out")["ok"], verify_folder(tmp_path / "out")["problems"]


def test_frames_of_polars_with_strings_categoricals_and_enums(plain):
    polars = pytest.importorskip("polars")
    for kind in (polars.String, polars.Categorical, polars.Enum(["a", "b", "c", "x", "y"])):
        edges = polars.DataFrame(
            {"source": SOURCE, "destination": DESTINATION, "value": VALUE}, schema_overrides={"source": kind}
        ).with_columns(polars.col("destination").cast(kind))
        budgets = polars.DataFrame({"destination": BUDGETED, "budget": BUDGET})
        assert _objective(from_arrow(edges, budgets)) == pytest.approx(plain, rel=1e-6)


def test_relations_of_duckdb_with_decimals(plain):
    duckdb = pytest.importorskip("duckdb")
    edges = duckdb.sql(
        "select * from (values ('b','x',2.0::decimal(9,2)), ('b','y',1.0), ('a','x',3.0), ('c','y',1.0)) "
        "t(source, destination, value)"
    )
    budgets = duckdb.sql("select * from (values ('y', 1.0), ('x', 1.5)) t(destination, budget)")
    assert _objective(from_arrow(edges, budgets)) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    ("source", "destination", "budgeted", "message"),
    [
        (SOURCE, ["01", "1", "01", "1"], [1, 2], "large_string keys do not fit the int64"),
        (SOURCE, [1, 2, 1, 2], ["1", "2"], "int64 keys do not fit the large_string"),
        (SOURCE, DESTINATION, [1.0, 2.0], "budgets.destination: expected integers, strings"),
        (SOURCE, [True, False, True, False], BUDGETED, "edges.destination: expected integers, strings"),
        (
            pa.DictionaryArray.from_arrays(pa.array([0, 0, 1, 2]), pa.array(["b", None, "c"])),
            DESTINATION,
            BUDGETED,
            "edges.source: expected keys, got 1 nulls",
        ),
        (pa.array([2**63, 1, 2, 3], pa.uint64()), DESTINATION, BUDGETED, "edges.source: a key of type uint64"),
    ],
)
def test_keys_that_would_be_read_as_others_are_refused(source, destination, budgeted, message):
    with pytest.raises(ValueError, match=message):
        _problem(source, destination, budgeted)


def _parts(folder, **columns):
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "part-0.parquet")


def test_partitions_of_a_warehouse_with_other_orders_and_widths(plain, tmp_path):
    first = {"source": pa.array([1, 1], pa.int32()), "destination": ["x", "y"], "value": pa.array([2.0, 1.0])}
    other = {"value": pa.array([3.0, 1.0], pa.float32()), "source": pa.array([0, 2], pa.int64())}
    _parts(tmp_path / "edges" / "date=2026-01-01", **first)
    _parts(tmp_path / "edges" / "date=2026-01-02", **other, destination=pa.array(["x", "y"]).dictionary_encode())
    (tmp_path / "edges" / "_SUCCESS").touch()
    (tmp_path / "edges" / "_temporary").mkdir()
    (tmp_path / "edges" / "_temporary" / "half.parquet").write_bytes(b"half")
    pq.write_table(pa.table({"destination": BUDGETED, "budget": BUDGET}), tmp_path / "budgets.parquet")
    assert _objective(read_problem(tmp_path)) == pytest.approx(plain, rel=1e-6)
    by_day = read_problem(tmp_path, columns=Columns(source="date"), allow_unused=True)
    assert by_day.source_keys.to_pylist() == ["2026-01-01", "2026-01-02"]
    _parts(tmp_path / "edges" / "date=2026-01-03", **first, cost=[1.0, 2.0])
    with pytest.raises(ValueError, match="expected no column 'cost'"):
        read_problem(tmp_path)


def test_csv_files_hold_text_keys(plain, tmp_path):
    edges = pa.table({"source": ["01", "01", "1", "2"], "destination": ["7", "8", "7", "8"], "value": VALUE})
    pa.csv.write_csv(edges, tmp_path / "edges.csv")
    pa.csv.write_csv(pa.table({"destination": ["8", "7"], "budget": BUDGET}), tmp_path / "budgets.csv")
    problem = read_problem(tmp_path / "edges.csv", tmp_path / "budgets.csv")
    assert problem.source_keys.to_pylist() == ["01", "1", "2"]
    assert _objective(problem) == pytest.approx(plain, rel=1e-6)
    (tmp_path / "edges.csv").write_text("source,destination,value\n1,7,abc\n")
    with pytest.raises(ValueError, match=r"edges.value: expected a column of numbers"):
        read_problem(tmp_path / "edges.csv", tmp_path / "budgets.csv")
    (tmp_path / "edges.csv").write_text("source,destination,value\n1,7\n1,2,3,4\n")
    with pytest.raises(ValueError, match=r"edges.csv: expected a CSV file"):
        read_problem(tmp_path / "edges.csv", tmp_path / "budgets.csv")


def test_values_as_decimals_and_whole_numbers(plain):
    for value in (
        pa.array([2, 1, 3, 1], pa.int16()),
        pa.array(list(map(decimal.Decimal, "2131")), pa.decimal128(9, 3)),
    ):
        assert _objective(_problem(SOURCE, DESTINATION, BUDGETED, value)) == pytest.approx(plain, rel=1e-6)
    assert np.isfinite(plain)


def test_tables_that_are_folders_are_read_as_spark_writes_them(tmp_path):
    edges = pa.table({"source": ["a", "a", "b"], "destination": ["x", "y", "x"], "value": [1.0, 2.0, 3.0]})
    budgets = pa.table({"destination": ["x", "y"], "budget": [1.0, 1.0]})
    for name, table in (("edges", edges), ("budgets", budgets)):
        folder = tmp_path / f"{name}.parquet"
        folder.mkdir()
        (folder / "_SUCCESS").touch()
        pq.write_table(table.slice(0, 1), folder / "part-00000.snappy.parquet")
        pq.write_table(table.slice(1).select(table.column_names[::-1]), folder / "part-00001.snappy.parquet")
    problem = read_problem(tmp_path / "edges.parquet", tmp_path / "budgets.parquet")
    assert problem.data.variables == 3
    assert solve(problem, 1e-6).objective == pytest.approx(-5.0)
    policy = Policy(np.array([0.0, 0.0]), 1e-3, keys=np.array(["x", "y"]))
    assert score_file(policy, tmp_path / "edges.parquet", Columns(), tmp_path / "x.parquet")["candidates"] == 3
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"edges/\*.parquet in the problem folder"):
        read_problem(tmp_path / "nothing", tmp_path / "budgets.parquet")
    with pytest.raises(ValueError, match="folder of Parquet files, found none"):
        read_problem(tmp_path / "edges.parquet", tmp_path / "nothing")
    pq.write_table(pa.table({"destination": ["z"]}), tmp_path / "budgets.parquet" / "z.parquet")
    with pytest.raises(ValueError, match="columns differ"):
        read_problem(tmp_path / "edges.parquet", tmp_path / "budgets.parquet")
