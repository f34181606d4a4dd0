"""Tables of every shape: several budgets, several destinations, caps by source, other libraries' frames."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polytope_lp import Columns, box_cut, from_arrow, read_problem, simplex, solve

EDGES = {
    "user": ["u2", "u1", "u1", "u3", "u2"],
    "campaign": ["a", "a", "b", "b", "b"],
    "advertiser": ["X", "X", "Y", "Y", "Y"],
    "v": [2.0, 3.0, 1.0, 2.5, 2.0],
    "bid": [1.0, 1.0, 0.5, 1.0, 2.0],
    "views": [1.0, 1.0, 1.0, 1.0, 3.0],
}
USER = {"source": "user", "value": "v"}


def test_several_budgets_per_destination_agree_with_highs(oracle):
    budgets = {"campaign": ["b", "a"], "money": [1.5, 1.2], "count": [2.0, 1.5]}
    names = Columns(**USER, destination="campaign", cost=("bid", "views"), budget=("money", "count"))
    problem = from_arrow(EDGES, budgets, columns=names)
    assert problem.rows == 4
    assert problem.destinations == 2
    assert problem.resources == ("money", "count")
    solution = solve(problem, 1e-7)
    assert solution.objective == pytest.approx(oracle(problem).fun, rel=1e-6)
    assert solution.verify()["ok"]
    prices = solution.prices().to_pylist()
    assert [(p["destination"], p["resource"], p["budget"]) for p in prices] == [
        ("b", "money", 1.5), ("a", "money", 1.2), ("b", "count", 2.0), ("a", "count", 1.5),
    ]  # fmt: skip
    x = {(r["source"], r["destination"]): r["x"] for r in solution.primal().read_all().to_pylist()}
    assert x["u1", "a"] == pytest.approx(1.0, abs=1e-5)


def test_local_and_global_budgets_agree_with_highs(oracle):
    budgets = {"key": ["a", "b", "X", "Y"], "budget": [1.5, 3.0, 1.2, 1.1]}
    edges = EDGES | {"key": EDGES["campaign"]}
    problem = from_arrow(edges, budgets, columns=Columns(**USER, destination=("key", "advertiser"), cost="bid"))
    solution = solve(problem, 1e-7)
    assert solution.objective == pytest.approx(oracle(problem).fun, rel=1e-6)
    assert solution.verify()["ok"]
    assert solution.load.tolist()[2] == pytest.approx(1.2, rel=1e-6)
    twice = {name: [*column, column[1]] for name, column in edges.items()}
    with pytest.raises(ValueError, match="source u1 to first destination a appears twice"):
        from_arrow(twice, budgets, columns=Columns(**USER, destination=("key", "advertiser"), cost="bid"))


def test_caps_by_source_follow_their_keys(oracle):
    budgets = {"campaign": ["a", "b"], "budget": [10.0, 10.0]}
    caps = {"user": ["u3", "u9", "u1", "u2"], "cap": [0.25, 5.0, 2.0, 1.5]}
    names = Columns(**USER, destination="campaign", cost="bid")
    problem = from_arrow(EDGES, budgets, box_cut(1.0, 1.0), names, sources=caps)
    assert problem.skipped == 1  # u9 has no edges
    named = dict(zip(problem.source_keys.to_pylist(), problem.data.cap.tolist(), strict=True))
    assert named == {"u2": 1.5, "u1": 2.0, "u3": 0.25}
    solution = solve(problem, 1e-7)
    assert solution.objective == pytest.approx(-(3.0 + 1.0 + 2.0 + 0.5 * 2.0 + 0.25 * 2.5), rel=1e-6)
    assert solution.objective == pytest.approx(oracle(problem).fun, rel=1e-6)


@pytest.mark.parametrize(
    ("caps", "message"),
    [
        ({"user": ["u1"], "cap": [1.0]}, "'u2' of the edges has no cap"),
        ({"user": ["u1", "u2", "u3"], "cap": [1.0, -1.0, 1.0]}, "sources.cap: .*at least 0"),
        ({"user": ["u1", "u2", "u2"], "cap": [1.0, 1.0, 1.0]}, "sources.user: expected each source once"),
        ({"user": [1, 2, 3], "cap": [1.0, 1.0, 1.0]}, "sources.user: large_string keys do not fit the int64"),
        ({"user": ["u1", "u2", "u3"], "cap": [1.0, float("nan"), 1.0]}, "sources.cap: .*nan"),
        ({"user": ["u1", "u2", "u3"]}, "sources: expected a column 'cap'"),
    ],
)
def test_bad_caps_name_the_column(caps, message):
    budgets = {"campaign": ["a", "b"], "budget": [10.0, 10.0]}
    with pytest.raises(ValueError, match=message):
        from_arrow(EDGES, budgets, columns=Columns(**USER, destination="campaign"), sources=caps)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"cost": "price"}, "edges: expected a column 'price'"),
        ({"cost": ("bid", "views")}, "columns.cost: expected 1 names, got 2"),
        ({"budget": ("budget", "count")}, "columns.cost: expected 2 names, got 1"),
        ({"destination": ("campaign", "advertiser"), "budget": ("budget", "count")}, "columns: .* got both"),
        ({"weight": "size"}, "edges: expected a column 'size'"),
        ({"sense": "direction"}, "budgets: expected a column 'direction'"),
        ({"value": "worth"}, "edges: expected a column 'worth'"),
    ],
)
def test_named_columns_must_be_there(columns, message):
    budgets = {"campaign": ["a", "b"], "budget": [10.0, 10.0]}
    with pytest.raises(ValueError, match=message):
        from_arrow(EDGES, budgets, columns=Columns(**({**USER, "destination": "campaign"} | columns)))


class Frame:
    """What polars, cuDF and others offer: the Arrow stream protocol and nothing else."""

    def __init__(self, table):
        self._table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self._table.__arrow_c_stream__(requested_schema)


def test_frames_of_other_libraries_give_the_same_problem():
    budgets = {"campaign": ["a", "b"], "budget": [1.0, 1.5]}
    names = Columns(**USER, destination="campaign", cost="bid")
    objectives = []
    for make in (lambda t: t, pa.table, lambda t: Frame(pa.table(t))):
        objectives.append(solve(from_arrow(make(EDGES), make(budgets), columns=names), 1e-7).objective)
    encoded = pa.table({name: pa.array(column).dictionary_encode() for name, column in EDGES.items() if name != "v"})
    encoded = (
        encoded.append_column("v", pa.array(EDGES["v"]))
        .drop_columns(["bid"])
        .append_column("bid", pa.array(EDGES["bid"]))
    )
    objectives.append(solve(from_arrow(encoded, budgets, columns=names), 1e-7).objective)
    assert np.ptp(objectives) == 0.0
    with pytest.raises(TypeError, match=r"edges: expected a table .*, got int"):
        from_arrow(3, budgets)


def test_pandas_frames_and_categories_are_taken():
    budgets = pd.DataFrame({"campaign": ["a", "b"], "budget": [1.0, 1.5]})
    names = Columns(**USER, destination="campaign", cost="bid")
    frame = pd.DataFrame(EDGES)
    truth = solve(from_arrow(EDGES, {"campaign": ["a", "b"], "budget": [1.0, 1.5]}, columns=names), 1e-7).objective
    for edges in (frame, frame.astype({"user": "category", "campaign": "category"}), frame.iloc[::-1]):
        assert solve(from_arrow(edges, budgets, columns=names), 1e-7).objective == pytest.approx(truth, rel=1e-6)


def test_wide_integer_keys_and_large_strings_are_kept():
    edges = {"source": np.array([2**60, 2**60, -5]), "destination": np.array([2**50, 7, 7]), "value": [1.0, 2.0, 3.0]}
    budgets = {"destination": np.array([7, 2**50]), "budget": [1.5, 1.0]}
    solution = solve(from_arrow(edges, budgets), 1e-6)
    rows = solution.primal().read_all().to_pylist()
    assert {r["source"] for r in rows} <= {2**60, -5}
    assert {r["destination"] for r in rows} <= {2**50, 7}
    large = pa.table({"source": pa.array(["s", "t"], pa.large_string()), "destination": [7, 7], "value": [1.0, 2.0]})
    assert solve(from_arrow(large, {"destination": [7], "budget": [1.0]}), 1e-6).objective == pytest.approx(-2.0)


def test_equal_rows_and_negative_costs_are_met_exactly(oracle):
    edges = {"source": [0, 0, 1, 1], "destination": [0, 1, 0, 1], "value": [1.0, 2.0, 2.0, 1.0]}
    budgets = {"destination": [0, 1], "budget": [1.2, 0.5], "sense": ["=", "<="]}
    problem = from_arrow(edges, budgets)
    solution = solve(problem, 1e-6)
    assert solution.status == "optimal"
    assert solution.load[0] == pytest.approx(1.2, rel=1e-9)
    assert solution.upper_bound == solution.objective
    assert solution.objective == pytest.approx(oracle(problem).fun, abs=1e-5)
    assert solution.verify()["ok"]
    mixed = from_arrow(edges | {"cost": [1.0, 1.0, -0.5, 1.0]}, {"destination": [0, 1], "budget": [0.1, 0.5]})
    solution = solve(mixed, 1e-6)
    assert solution.status == "optimal"
    assert solution.objective == pytest.approx(oracle(mixed).fun, abs=1e-5)


def test_problem_folders_may_hold_caps_and_names(tmp_path):
    folder = tmp_path / "problem"
    (folder / "edges").mkdir(parents=True)
    table = pa.table({name: EDGES[name] for name in ("user", "campaign", "v", "bid")})
    pq.write_table(table.slice(0, 3), folder / "edges" / "0.parquet")
    pq.write_table(table.slice(3), folder / "edges" / "1.parquet")
    pq.write_table(pa.table({"campaign": ["a", "b"], "budget": [1.0, 2.0]}), folder / "budgets.parquet")
    pq.write_table(pa.table({"user": ["u1", "u2", "u3"], "cap": [1.0, 1.0, 0.5]}), folder / "sources.parquet")
    names = {**USER, "destination": "campaign", "cost": "bid"}
    (folder / "problem.json").write_text(json.dumps({"polytope": {"upper": 1.0}, "columns": names}))
    problem = read_problem(folder)
    assert sorted(problem.data.cap.tolist()) == [0.5, 1.0, 1.0]
    assert problem.data.upper.tolist() == [1.0]
    (folder / "problem.json").write_text(json.dumps({"columns": {"color": "x"}}))
    with pytest.raises(ValueError, match=r"columns: .*color"):
        read_problem(folder)
    (folder / "problem.json").write_text("{")
    with pytest.raises(ValueError, match="expected a JSON file"):
        read_problem(folder)
    pq.write_table(table.rename_columns(["user", "campaign", "v", "b"]), folder / "edges" / "2.parquet")
    (folder / "problem.json").write_text(json.dumps({"columns": names}))
    with pytest.raises(ValueError, match=r"2.parquet: expected a column 'bid'"):
        read_problem(folder)


def test_caps_in_two_places_are_refused():
    import torch

    caps, budgets = {"user": ["u1", "u2", "u3"], "cap": [1.0, 1.0, 1.0]}, {"campaign": ["a", "b"], "budget": [1.0, 1.0]}
    with pytest.raises(ValueError, match="got both"):
        from_arrow(EDGES, budgets, simplex(torch.ones(3)), Columns(**USER, destination="campaign"), sources=caps)
