import json
from pathlib import Path

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
        "primal.arrow", "prices.parquet", "history.parquet", "policy.npz", "input.json", "certificate.json", "run.json",
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
        ({"source": [1.5, 2.5, 1.0, 1.0]}, {}, "edges.source: expected integers, strings"),
        ({"source": ["b", None, "a", "c"]}, {}, "edges.source: .*1 nulls"),
        ({"source": ["b", "b", "b", "c"]}, {}, "edge from source b to destination x appears twice"),
        ({}, {"budget": [1.0, np.inf]}, "budgets.budget: .*inf"),
        ({}, {"destination": ["x", "x"]}, "budgets.destination: expected each destination once"),
        ({}, {"destination": ["y", "x", "w"], "budget": [1.0, 1.0, 1.0]}, "budgets: 1 without any edge, such as w"),
        ({}, {"sense": ["<=", "<"]}, "budgets.sense: .*'<'"),
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


def _market(tmp_path, sources=1500):
    problem, out = tmp_path / "problem", tmp_path / "out"
    _run("generate", "--sources", sources, "--destinations", 20, "-o", problem)
    _run("solve", problem, "-o", out)
    return problem, out


def test_policy_is_exported_with_its_scorer_and_scores_a_file(tmp_path):
    problem, out = _market(tmp_path)
    policy, scorer = tmp_path / "p.json", tmp_path / "scorer.py"
    exported = json.loads(_run("export-policy", out, "-o", policy, "--scorer", scorer, "--json").output)
    assert exported["destinations"] == 20
    assert "def score" in scorer.read_text()
    edges = next((problem / "edges").glob("*.parquet"))
    scored = json.loads(_run("score", policy, edges, "-o", tmp_path / "x.parquet", "--json").output)
    certificate = json.loads((out / "certificate.json").read_text())
    assert scored["value"] == pytest.approx(-certificate["objective"], rel=1e-2)
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["source", "destination", "x"]
    assert sum(table["x"].to_pylist()) == pytest.approx(scored["allocated"])
    assert "not a policy file" in _run("score", edges, edges, "-o", tmp_path / "y.parquet", code=2).output
    assert "expected .npz or .json" in _run("export-policy", out, "-o", tmp_path / "p.bin", code=2).output
    _run("export-policy", out, "-o", tmp_path / "sharp.npz", "--gamma", 1e-5)
    assert Policy.load(tmp_path / "sharp.npz").gamma == 1e-5


def test_pacing_reads_what_was_spent(tmp_path):
    _, out = _market(tmp_path)
    prices = pq.read_table(out / "prices.parquet")
    spent = pa.table({"destination": prices["destination"], "spent": [0.5 * v for v in prices["load"].to_pylist()]})
    pq.write_table(spent, tmp_path / "spent.parquet")
    report = tmp_path / "report.parquet"
    args = ("pacing", out, "--spent", tmp_path / "spent.parquet", "--elapsed", 0.5, "-o", report)
    assert json.loads(_run(*args, "--json").output)["states"] == {"on plan": 20}
    assert pq.read_table(report).num_rows == 20
    assert "on plan" in _run(*args).output
    assert "elapsed" in _run("pacing", out, "--spent", tmp_path / "spent.parquet", "--elapsed", 2, code=2).output
    pq.write_table(pa.table({"destination": [999], "spent": [1.0]}), tmp_path / "spent.parquet")
    assert "without a budget" in _run(*args, code=2).output


def test_solutions_warm_start_others_and_draw(tmp_path):
    pytest.importorskip("matplotlib")
    problem, out = _market(tmp_path)
    cold = json.loads((out / "certificate.json").read_text())
    args = ("solve", problem, "-o", tmp_path / "again", "--warm-start", out, "--plot", "--json")
    warm = json.loads(_run(*args).output)
    assert warm["evaluations"] < cold["evaluations"]
    assert (tmp_path / "again" / "convergence.png").stat().st_size > 10_000
    _run("generate", "--sources", 500, "--destinations", 12, "-o", tmp_path / "other")
    assert "prices" in _run("solve", tmp_path / "other", "-o", out, "--warm-start", out, code=2).output


def test_columns_are_named_on_the_command_line_and_remembered(tmp_path):
    edges, budgets, out = tmp_path / "edges.parquet", tmp_path / "b.parquet", tmp_path / "out"
    renamed = {
        "user": EDGES["source"],
        "ad": EDGES["destination"],
        "worth": EDGES["value"],
        "bid": [1.0, 1.0, 2.0, 1.0],
    }
    pq.write_table(pa.table(renamed), edges)
    pq.write_table(pa.table({"ad": ["y", "x"], "money": [1.0, 2.0], "views": [5.0, 1.5]}), budgets)
    pq.write_table(pa.table({"user": ["a", "b", "c"], "cap": [1.0, 0.5, 1.0]}), tmp_path / "caps.parquet")
    named = ("source=user", "destination=ad", "value=worth", "budget=money,views", "cost=bid,one")
    flags = [flag for pair in named for flag in ("--column", pair)]
    run = ("solve", edges, "--budgets", budgets, "--sources", tmp_path / "caps.parquet", *flags, "-o", out)
    assert "'one'" in _run(*run, code=2).output
    pq.write_table(pa.table(renamed | {"one": [1.0] * 4}), edges)
    _run(*run, "--tol", 1e-6)
    assert _run("verify", out).output.startswith("every claim holds")
    assert pq.read_table(out / "prices.parquet")["resource"].to_pylist() == ["money", "money", "views", "views"]
    pq.write_table(pa.table({"user": ["a", "b", "c"], "cap": [1.0, 0.4, 1.0]}), tmp_path / "caps.parquet")
    assert "changed" in _run("verify", out, code=1).output
    assert "NAME=COLUMN" in _run("solve", edges, "--budgets", budgets, "--column", "user", "-o", out, code=2).output


@pytest.mark.slow
def test_bench_and_demo_print_their_figures(tmp_path):
    pytest.importorskip("matplotlib")
    timed = json.loads(_run("bench", "--sources", 2000, "--destinations", 30, "--json").output)
    assert timed["status"] == "optimal"
    assert [row["gamma"] for row in timed["ridges"]] == [0.1, 0.01, 0.001, 0.0001]
    shown = json.loads(_run("demo", "--sources", 3000, "-o", tmp_path / "demo", "--json").output)
    assert shown["verified"]
    assert shown["gap"] <= 1e-4
    assert (tmp_path / "demo" / "convergence.png").exists()


def test_an_upper_bound_keeps_the_cap_of_the_problem(tmp_path):
    problem, out = tmp_path / "problem", tmp_path / "out"
    _run("generate", "--sources", 300, "--destinations", 12, "--degree", 4, "-o", problem)
    described = json.loads((problem / "problem.json").read_text())
    (problem / "problem.json").write_text(json.dumps(described | {"polytope": {"cap": 2.0}}))
    _run("solve", problem, "--upper", 0.6, "-o", out)
    assert json.loads((out / "input.json").read_text())["read"]["polytope"] == {"cap": 2.0, "upper": 0.6}
    _run("verify", out)
    assert "read.polytope.cap" in _run("solve", problem, "--cap", "inf", "--upper", 0.6, "-o", out, code=2).output
    _run("solve", problem, "--cap", "inf", "--upper", 0.6, "-o", out, "--overwrite")
    assert json.loads((out / "input.json").read_text())["read"]["polytope"] == {"cap": None, "upper": 0.6}
    _run("verify", out)
    assert "cap" in _run("solve", problem, "--cap", -1, "-o", out, code=2).output


def test_infeasible_budgets_end_with_a_certificate_in_the_folder(tmp_path):
    edges, budgets, out = tmp_path / "edges.parquet", tmp_path / "b.parquet", tmp_path / "out"
    pq.write_table(pa.table(EDGES), edges)
    pq.write_table(pa.table({"destination": ["y", "x"], "budget": [1.0, 9.0], "sense": ["<=", "="]}), budgets)
    solved = json.loads(_run("solve", edges, "--budgets", budgets, "-o", out, "--json").output)
    assert solved["status"] == "infeasible"
    assert solved["evaluations"] < 500
    _run("verify", out)


def test_help_lists_every_command():
    text = _run("--help").output
    for command in ("generate", "solve", "verify", "export-policy", "score", "pacing", "bench", "demo"):
        assert command in text
        assert "Usage" in _run(command, "--help").output


@pytest.mark.slow
def test_a_killed_solve_resumes_from_its_folder(tmp_path):
    import signal
    import subprocess
    import sys
    import time

    problem, out = tmp_path / "problem", tmp_path / "out"
    _run("generate", "--sources", 10_000, "--destinations", 100, "-o", problem)
    command = ["-m", "polytope_lp", "solve", str(problem), "-o", str(out), "--tol", "1e-5", "--threads", "1"]
    running = subprocess.Popen([sys.executable, *command])
    deadline = time.monotonic() + 600
    while not (out / "checkpoint.npz").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert {f.name for f in out.iterdir() if not f.name.startswith(".")} == {"checkpoint.npz", "run.json"}
    resumed = json.loads(_run("solve", problem, "-o", out, "--tol", 1e-5, "--json").output)
    assert resumed["status"] in {"optimal", "stalled"}
    assert not (out / "checkpoint.npz").exists()
    history = pq.read_table(out / "history.parquet")
    assert history["evaluation"].to_pylist() == list(range(1, resumed["evaluations"] + 1))
    _run("verify", out)


def _shell(command, **options):
    import subprocess
    import sys

    command = command.replace("polytope-lp", f"{sys.executable} -m polytope_lp").replace("PYTHON", sys.executable)
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    "command",
    [
        "polytope-lp solve problem -o out --threads 0",
        "polytope-lp generate --sources 100 --destinations 5 -o /proc/problem",
        "polytope-lp verify problem",
        "polytope-lp verify nowhere",
        "polytope-lp pacing problem --spent problem/budgets.parquet --elapsed 0.5",
        "polytope-lp export-policy problem -o p.npz",
        "polytope-lp solve problem -o problem",
        "polytope-lp solve problem -o out --json > /dev/full",
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, command):
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    _run("generate", "--sources", 100, "--destinations", 5, "--degree", 2, "-o", tmp_path / "problem")
    done = _shell(command, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    last = [line for line in done.stderr.splitlines() if not line.startswith(("Usage", "Try ")) and line]
    assert len(last) == 1, done.stderr
    assert last[0].startswith("Error: ")


def test_a_killed_generate_leaves_nothing_that_stands_in_the_way(tmp_path):
    problem = tmp_path / "problem"
    args = ("generate", "--sources", 300, "--destinations", 5, "--degree", 2, "-o", problem)
    _run(*args)
    whole = {f.name: f.read_bytes() for f in (problem / "edges").iterdir()}
    record = json.loads((problem / "run.json").read_text())
    (problem / "run.json").write_text(json.dumps(record | {"result": None}))  # as a kill before the end leaves it
    (problem / "problem.json").unlink()
    host = __import__("socket").gethostname()
    orphan = problem / "edges" / f".partial-{''.join(c for c in host if c.isalnum()) or 'host'}-999999999-x"
    orphan.mkdir()
    (orphan / "00000.parquet").write_bytes(b"half")
    _run(*args)
    assert {f.name: f.read_bytes() for f in (problem / "edges").iterdir()} == whole
    _run("solve", problem, "-o", tmp_path / "out")
    assert "holds a run with other inputs" in _run(*args, "--seed", 1, code=2).output


def test_a_solve_that_met_its_limit_goes_on_and_a_finished_one_repeats_its_result(tmp_path):
    problem, out = tmp_path / "problem", tmp_path / "out"
    _run("generate", "--sources", 3000, "--destinations", 40, "-o", problem)
    args = ("solve", problem, "-o", out, "--tol", 1e-6, "--json")
    short = json.loads(_run(*args, "--time-limit", 0.02).output)
    assert short["status"] == "time_limit"
    _run("verify", out)
    done = json.loads(_run(*args).output)
    assert done["status"] == "optimal"
    assert not (out / "checkpoint.npz").exists()
    assert json.loads(_run(*args).output) == done
    assert "tol: " in _run("solve", problem, "-o", out, code=2).output
    assert json.loads(_run("solve", problem, "-o", out, "--overwrite", "--json").output)["tol"] == 1e-4


@pytest.mark.parametrize("name", ["policy.npz", "history.parquet", "prices.parquet", "input.json", "primal.arrow"])
def test_a_solution_with_a_missing_or_garbage_file_is_not_verified(tmp_path, name):
    _, out = _market(tmp_path, 300)
    whole = (out / name).read_bytes()
    for damage in (b"", b"garbage", whole[: len(whole) // 2]):
        (out / name).write_bytes(damage)
        assert "Error: " in _run("verify", out, code=2).output
    (out / name).unlink()
    assert "Error: " in _run("verify", out, code=2).output
    (out / name).write_bytes(whole)
    _run("verify", out)


def test_prices_history_and_policy_are_checked_against_the_problem(tmp_path):
    _, out = _market(tmp_path, 300)
    prices, history = pq.read_table(out / "prices.parquet"), pq.read_table(out / "history.parquet")
    policy = Policy.load(out / "policy.npz")

    def lies(line):
        found = json.loads(_run("verify", out, "--json", code=1).output)["problems"]
        assert any(line in problem for problem in found), found

    for name, line in (("budget", "the budgets"), ("load", "the loads"), ("used", "the shares used")):
        column = pa.array([2.0 * (v or 1.0) for v in prices[name].to_pylist()])
        at = prices.column_names.index(name)
        pq.write_table(prices.set_column(at, name, column), out / "prices.parquet")
        lies(line)
    pq.write_table(prices, out / "prices.parquet")
    pq.write_table(history.slice(0, history.num_rows - 1), out / "history.parquet")
    lies("history: ")
    pq.write_table(history, out / "history.parquet")
    Policy(policy.lam - 1.0, policy.gamma).save(out / "policy.npz")
    lies("policy: ")
    policy.save(out / "policy.npz")
    _run("verify", out)


def test_help_loads_no_torch():
    assert _shell("PYTHON -c 'import sys, polytope_lp.cli; sys.exit(\"torch\" in sys.modules)'").returncode == 0


def test_the_demo_asks_for_matplotlib_before_it_computes(tmp_path, monkeypatch):
    from core_tensor.app import figures
    from core_tensor.app.extras import MissingExtraError

    def missing(path, extra):
        raise MissingExtraError(f"pip install '{extra}'")

    monkeypatch.setattr(figures, "check", missing)
    assert "polytope-lp[plot]" in _run("demo", "--quick", "-o", tmp_path / "demo", code=2).output
    assert not (tmp_path / "demo").exists()
