"""Guaranteed delivery: budgets that are minimums, alone and beside maximums, against HiGHS."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from polytope_lp import Columns, Policy, from_arrow, pack, solve
from polytope_lp.cli import main

EDGES = {
    "user": ["u1", "u1", "u2", "u2", "u3"],
    "ad": ["x", "y", "x", "y", "y"],
    "worth": [3.0, 1.0, 2.0, 1.5, 1.0],
    "bid": [1.0, 1.0, 1.0, 2.0, 1.0],
    "one": [1.0] * 5,
}
NAMES = Columns(
    source="user", destination="ad", value="worth", budget=("money", "views"), cost=("bid", "one"), sense=("a", "b")
)


def _budgets(views):
    return {"ad": ["x", "y"], "money": [2.0, 4.0], "views": views, "a": ["<=", "<="], "b": [">=", ">="]}


def test_a_guarantee_is_delivered_at_a_price():
    free = solve(from_arrow(EDGES, _budgets([0.0, 0.0]), columns=NAMES), 1e-7)
    held = solve(from_arrow(EDGES, _budgets([0.0, 2.5]), columns=NAMES), 1e-7)
    assert held.status == "optimal"
    assert 0 <= held.gap <= 1e-7
    assert held.verify()["ok"], held.verify()["problems"]
    prices = held.prices().to_pylist()
    delivered = next(row for row in prices if row["destination"] == "y" and row["resource"] == "views")
    assert delivered["load"] == pytest.approx(2.5, rel=1e-5)
    assert delivered["budget"] == 2.5
    assert delivered["price"] < 0  # one more guaranteed view costs value
    assert -free.objective > -held.objective
    assert Policy.from_solution(held).lam[3] == pytest.approx(delivered["price"], rel=1e-3)
    more = solve(from_arrow(EDGES, _budgets([0.0, 2.6]), columns=NAMES), 1e-7)
    assert -more.objective + held.objective == pytest.approx(0.1 * delivered["price"], rel=1e-3)
    assert held.value_bound([2.0, 4.0, 0.0, 2.6]) >= -more.objective - 1e-6


def test_guarantees_that_cannot_be_met_are_proved_infeasible():
    solution = solve(from_arrow(EDGES, _budgets([0.0, 9.0]), columns=NAMES), 1e-6)
    assert solution.status == "infeasible"
    assert solution.verify()["ok"], solution.verify()["problems"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_random_minimums_agree_with_highs(oracle, seed):
    random = np.random.default_rng(seed)
    source, destination = np.nonzero(random.random((8, 4)) < 0.7)
    edges = {"source": source, "destination": destination, "value": random.random(source.size)}
    budgets = {"destination": np.arange(4), "budget": 2.5 * random.random(4), "sense": random.choice(["<=", ">="], 4)}
    problem = from_arrow(edges, budgets, allow_unused=True)
    truth, ours = oracle(problem), solve(problem, 1e-6)
    assert ours.verify()["ok"], ours.verify()["problems"]
    if truth.status == 2:
        assert ours.status == "infeasible"
    else:
        assert ours.status == "optimal"
        assert ours.objective == pytest.approx(truth.fun, rel=1e-5, abs=1e-6)


def test_minimums_survive_files_packing_and_the_command_line(tmp_path):
    pq.write_table(pa.table(EDGES), tmp_path / "edges.parquet")
    pq.write_table(pa.table(_budgets([0.0, 2.5])), tmp_path / "b.parquet")
    named = ["source=user", "destination=ad", "value=worth", "budget=money,views", "cost=bid,one", "sense=a,b"]
    flags = [flag for pair in named for flag in ("--column", pair)]
    files = [str(tmp_path / "edges.parquet"), "--budgets", str(tmp_path / "b.parquet")]
    run = CliRunner().invoke(main, ["solve", *files, *flags, "-o", str(tmp_path / "out"), "--tol", "1e-6", "--json"])
    assert run.exit_code == 0, run.output
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "out")]).exit_code == 0
    packed = pack(tmp_path / "edges.parquet", tmp_path / "packed", tmp_path / "b.parquet", columns=NAMES)
    assert packed.at_least.tolist() == [False, False, True, True]
    assert solve(packed, 1e-6).objective == pytest.approx(json.loads(run.output)["objective"], rel=1e-5)


def test_a_minimum_beside_a_budget_is_a_range(oracle):
    random = np.random.default_rng(1)
    source, destination = np.nonzero(random.random((12, 4)) < 0.7)
    worth = random.random(source.size) * np.array([1.0, 0.2, 1.0, 0.1])[destination]
    edges = {"source": source, "destination": destination, "value": worth, "cost": 0.5 + random.random(source.size)}
    budgets = pa.table(
        {"destination": range(4), "budget": [3.0, 4.0, 2.0, 5.0], "minimum": pa.array([None, 2.0, 1.5, 4.0])}
    )
    problem = from_arrow(edges, budgets)
    solution = solve(problem, 1e-7)
    assert solution.status == "optimal"
    assert solution.objective == pytest.approx(oracle(problem).fun, rel=1e-6)
    rows = {(r["destination"], r["resource"]): r for r in solution.prices().to_pylist()}
    assert rows[3, "minimum"]["load"] == pytest.approx(4.0, rel=1e-6)
    assert rows[3, "minimum"]["price"] < 0 <= rows[3, "budget"]["price"]
    assert rows[0, "minimum"]["price"] == 0
    assert solution.verify()["ok"]
    with pytest.raises(ValueError, match=r"minimum: 6\.0 in row 0 is above the budget"):
        from_arrow(edges, {"destination": range(4), "budget": [3.0] * 4, "minimum": [6.0] * 4})
    with pytest.raises(ValueError, match="expected one budget per destination"):
        from_arrow(edges, {"destination": range(4), "budget": [3.0] * 4, "minimum": [1.0] * 4, "sense": ["="] * 4})
