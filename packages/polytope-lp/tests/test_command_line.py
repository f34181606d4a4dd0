import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from polytope_lp import Policy, from_arrow, solve
from polytope_lp.cli import main

EDGES = {"source": ["b", "b", "a", "c"], "destination": ["x", "y", "x", "y"], "value": [2.0, 1.0, 3.0, 1.0]}
BUDGETS = {"destination": ["y", "x"], "budget": [1.0, 1.0]}


def _run(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def test_generate_solve_verify_and_tampering(tmp_path):
    problem, out = tmp_path / "problem", tmp_path / "out"
    _run("generate", "--sources", 3000, "--destinations", 40, "-o", problem)
    solved = json.loads(_run("solve", problem, "-o", out, "--json").output)
    assert solved["status"] == "optimal"
    assert solved["gap"] <= 1e-4
    assert json.loads(_run("verify", out, "--json").output)["ok"]
    assert {f.name for f in out.iterdir()} == {
        "primal.arrow", "prices.parquet", "history.parquet", "policy.npz", "input.json", "certificate.json",
    }  # fmt: skip
    certificate = json.loads((out / "certificate.json").read_text())
    certificate["lower_bound"] *= 0.99
    (out / "certificate.json").write_text(json.dumps(certificate))
    assert "lower bound" in _run("verify", out, code=1).output


def test_files_of_edges_and_budgets_with_string_keys(tmp_path):
    edges, budgets, out = tmp_path / "edges.parquet", tmp_path / "b.parquet", tmp_path / "out"
    pq.write_table(pa.table(EDGES), edges)
    pq.write_table(pa.table(BUDGETS), budgets)
    _run("solve", edges, "--budgets", budgets, "--cap", 1, "--tol", 1e-6, "-o", out)
    with pa.OSFile(str(out / "primal.arrow")) as file:
        primal = pa.ipc.open_stream(file).read_all().to_pylist()
    amounts = {(r["source"], r["destination"]): r["x"] for r in primal}
    assert amounts["a", "x"] == pytest.approx(1.0, abs=1e-4)
    assert amounts.get(("b", "x"), 0.0) == pytest.approx(0.0, abs=1e-4)
    policy = Policy.load(out / "policy.npz")
    assert policy.rows(["x", "y"]).tolist() == [1, 0]
    _run("verify", out)


def test_unsorted_edges_give_the_same_solution():
    random = np.random.default_rng(0)
    source, destination = np.nonzero(random.random((60, 7)) < 0.4)
    value, budget = random.random(source.size), {"destination": np.arange(7), "budget": np.full(7, 3.0)}
    order = random.permutation(source.size)
    edges = {"source": source, "destination": destination, "value": value}
    first = solve(from_arrow(edges, budget), 1e-6)
    second = solve(from_arrow({k: v[order] for k, v in edges.items()}, budget), 1e-6)
    assert first.objective == pytest.approx(second.objective, rel=2e-6)
    assert second.verify()["ok"]


@pytest.mark.parametrize(
    ("edges", "budgets", "message"),
    [
        ({"value": [1.0, np.nan, 1.0, 1.0]}, {}, "edges.value: .*nan in row 1"),
        ({"value": ["1", "2", "3", "4"]}, {}, "edges.value: expected a column of numbers"),
        ({"cost": [1.0, np.inf, 1.0, 1.0]}, {}, "edges.cost: .*inf"),
        ({"destination": ["x", "z", "x", "y"]}, {}, "edges.destination: 'z' has no budget"),
        ({"destination": [1, 2, 3, 4]}, {}, "edges.destination: "),
        ({"source": [1.5, 2.5, 1.0, 1.0]}, {}, "edges.source: expected integers or strings"),
        ({"source": ["b", None, "a", "c"]}, {}, "edges.source: .*1 nulls"),
        ({"source": ["b", "b", "b", "c"]}, {}, "source b and destination x stand in more than one edge"),
        ({}, {"budget": [1.0, np.inf]}, "budgets.budget: .*inf"),
        ({}, {"destination": ["x", "x"]}, "budgets.destination: expected each destination once"),
        ({}, {"destination": ["y", "x", "w"], "budget": [1.0, 1.0, 1.0]}, "budgets: 1 without any edge, such as w"),
        ({}, {"sense": ["<=", ">="]}, "budgets.sense: .*'>='"),
    ],
)
def test_bad_tables_name_the_column(edges, budgets, message):
    with pytest.raises(ValueError, match=message):
        from_arrow(EDGES | edges, BUDGETS | budgets)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "empty"])
def test_bad_files_end_with_one_line_and_code_2(tmp_path, damage):
    edges, budgets = tmp_path / "edges.parquet", tmp_path / "b.parquet"
    pq.write_table(pa.table(EDGES), edges)
    pq.write_table(pa.table(BUDGETS), budgets)
    if damage == "truncated":
        edges.write_bytes(edges.read_bytes()[:-20])
    elif damage == "foreign":
        edges.write_text("source,destination,value\n")
    elif damage == "missing":
        edges.unlink()
    else:
        pq.write_table(pa.table(EDGES).slice(0, 0), edges)
    result = _run("solve", edges, "--budgets", budgets, "-o", tmp_path / "out", code=2)
    assert result.output.startswith("Error: ")
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()
