"""MPS models from the shell: solved, written in the names and the sense of the file, and verified from it."""

import gzip
import json

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from polytope_lp.cli import main
from scipy.optimize import linprog

MODEL = """NAME DIET
OBJSENSE
    MAX
ROWS
 N COST
 L LIM1
 G LIM2
 E MYEQN
COLUMNS
 X COST 1 LIM1 1
 X LIM2 1
 Y COST 4 LIM1 1
 Y MYEQN -1
 Z COST 9 LIM2 1
 Z MYEQN 1
RHS
 RHS LIM1 4 LIM2 1
 RHS MYEQN 7 COST -3
RANGES
 R LIM1 2
BOUNDS
 UP B X 4
 LO B Y -1
 UP B Y 1
 UP B Z 10
ENDATA
"""
"""Maximize x + 4 y + 9 z + 3 with 2 <= x + y <= 4, x + z >= 1, z - y = 7."""


def _run(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def solved(tmp_path):
    (tmp_path / "m.mps").write_text(MODEL)
    result = json.loads(_run("solve", tmp_path / "m.mps", "-o", tmp_path / "out", "--json"))
    return tmp_path / "out", result


def test_a_model_is_solved_in_the_names_and_the_sense_of_its_file(solved):
    out, result = solved
    oracle = linprog([-1, -4, -9], [[1, 1, 0], [-1, -1, 0], [-1, 0, -1]], [4, -2, -1], [[0, -1, 1]], [7],
                     [(0, 4), (-1, 1), (0, 10)])  # fmt: skip
    assert result["value"] == pytest.approx(3 - oracle.fun)
    assert result["bound"] == pytest.approx(result["value"])
    variables = pq.read_table(out / "variables.parquet").to_pylist()
    assert [(v["variable"], v["x"]) for v in variables] == [
        (name, pytest.approx(x)) for name, x in zip("XYZ", oracle.x, strict=True)
    ]
    rows = {(r["row"], r["side"]): r for r in pq.read_table(out / "rows.parquet").to_pylist()}
    assert set(rows) == {("LIM1", "<="), ("LIM1", ">="), ("LIM2", ">="), ("MYEQN", "=")}
    # scipy's marginals are of the minimum: one more unit of LIM1 adds what it takes from that
    assert rows["LIM1", "<="]["dual"] == pytest.approx(-oracle.ineqlin.marginals[0])
    assert rows["MYEQN", "="]["dual"] == pytest.approx(-oracle.eqlin.marginals[0])
    assert rows["LIM2", ">="]["activity"] == pytest.approx(oracle.x[0] + oracle.x[2])
    assert json.loads(_run("verify", out, "--json"))["ok"]


def test_the_same_command_repeats_its_result_and_compressed_files_do_too(solved, tmp_path):
    out, result = solved
    assert json.loads(_run("solve", tmp_path / "m.mps", "-o", out, "--json")) == result
    (tmp_path / "m.mps.gz").write_bytes(gzip.compress(MODEL.encode()))
    again = json.loads(_run("solve", tmp_path / "m.mps.gz", "-o", tmp_path / "other", "--json"))
    assert again["value"] == result["value"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 90.0}, "value"),
        ({"bound": 70.0}, "bound"),
        ({"lower_bound": 0.0}, "lower bound"),
        ({"objective": -80.0}, "objective"),
        ({"status": "optimal"}, "expected an upper bound"),
        ({"status": "foo"}, "status"),
    ],
)
def test_every_claim_about_a_model_is_checked(solved, change, message):
    out, _ = solved
    claims = json.loads((out / "certificate.json").read_text())
    (out / "certificate.json").write_text(json.dumps(claims | change))
    assert message in _run("verify", out, code=1)


def test_certificates_of_another_form_and_changed_models_are_refused(solved, tmp_path):
    out, _ = solved
    (tmp_path / "m.mps").write_text(MODEL.replace("UP B X 4", "UP B X 3.5"))
    assert "changed since" in _run("verify", out, code=1)
    claims = json.loads((out / "certificate.json").read_text())
    for wrong in ({}, claims | {"tol": "1"}, claims | {"gap": True}, claims | {"more": 1}):
        (out / "certificate.json").write_text(json.dumps(wrong))
        assert "a certificate" in _run("verify", out, code=2)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({" UP B X 4": " UP B X 0", " UP B Y 1": " UP B Y 0"}, "infeasible"),
        ({" UP B Z 10\n": "", " Z MYEQN 1\n": "", " Y MYEQN -1\n": "", " E MYEQN\n": "", "MYEQN 7 ": ""}, "unbounded"),
    ],
)
def test_models_without_an_optimum_come_with_a_ray(tmp_path, changes, status):
    text = MODEL
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "m.mps").write_text(text)
    assert json.loads(_run("solve", tmp_path / "m.mps", "-o", tmp_path / "out", "--json"))["status"] == status
    assert json.loads(_run("verify", tmp_path / "out", "--json"))["ok"]
    name = "rows" if status == "infeasible" else "variables"
    table = pq.read_table(tmp_path / "out" / f"{name}.parquet")
    pq.write_table(table.drop_columns("ray"), tmp_path / "out" / f"{name}.parquet")
    assert "ray" in _run("verify", tmp_path / "out", code=1)


@pytest.mark.parametrize("option", [("--cap", 1), ("--plot",), ("--budgets", "m.mps"), ("--column", "cost=c")])
def test_options_of_tables_are_refused_for_a_model(tmp_path, option):
    (tmp_path / "m.mps").write_text(MODEL)
    assert option[0] in _run("solve", tmp_path / "m.mps", *option, "-o", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_integer_variables_are_refused_unless_relaxed(tmp_path):
    (tmp_path / "m.mps").write_text(MODEL.replace(" X COST", " M 'MARKER' 'INTORG'\n X COST"))
    assert "relax" in _run("solve", tmp_path / "m.mps", "-o", tmp_path / "out", code=2)
    assert json.loads(_run("solve", tmp_path / "m.mps", "--relax", "-o", tmp_path / "out", "--json"))["value"] == 82.0
    assert "--relax" in _run("solve", tmp_path / "none.parquet", "--relax", "-o", tmp_path / "o", code=2)
