"""Readers of files that somebody else can have written, for the hostile harness: (name, make, read)."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

EDGES = {
    "source": ["b", "b", "a", "c"],
    "destination": ["x", "y", "x", "y"],
    "value": [2.0, 1.0, 3.0, 1.0],
    "cost": [1.0, 0.0, 2.0, 1.0],
}
BUDGETS = {"destination": ["y", "x"], "budget": [1.0, 1.5]}


def _problem(folder: Path) -> Path:
    (folder / "edges").mkdir()
    pq.write_table(pa.table(EDGES), folder / "edges" / "0.parquet")
    pq.write_table(pa.table(BUDGETS), folder / "budgets.parquet")
    pq.write_table(pa.table({"source": ["a", "b", "c"], "cap": [1.0, 2.0, 1.0]}), folder / "sources.parquet")
    (folder / "problem.json").write_text(json.dumps({"polytope": {"cap": 1.0, "upper": None, "equality": False}}))
    return folder


def _solve(problem):
    from polytope_lp import solve

    return solve(problem, 1e-3, evaluations=30)


def _read_problem(path: Path) -> None:
    from polytope_lp import read_problem

    _solve(read_problem(path))


def _csv(folder: Path) -> Path:
    pa.csv.write_csv(pa.table(EDGES), folder / "edges.csv")
    pa.csv.write_csv(pa.table(BUDGETS), folder / "budgets.csv")
    return folder


def _read_csv(path: Path) -> None:
    from polytope_lp import read_problem

    _solve(read_problem(path / "edges.csv", path / "budgets.csv"))


def _packed(folder: Path) -> Path:
    from polytope_lp import pack

    _problem(folder)
    for name in ("sources.parquet", "problem.json"):
        (folder / name).unlink()
    pack(folder, folder / "packed")
    for file in ((folder / "edges" / "0.parquet"), folder / "budgets.parquet", folder / "packed" / "run.json"):
        file.unlink()
    return folder


def _read_packed(path: Path) -> None:
    from polytope_lp import open_packed

    _solve(open_packed(path / "packed"))


def _solution(folder: Path) -> Path:
    from polytope_lp.runs.folders import Source, write_solution

    (folder / "problem").mkdir()
    source = Source.of(_problem(folder / "problem"))
    write_solution(_solve(source.problem()), folder / "out", source)
    return folder


def _verify(path: Path) -> None:
    from polytope_lp.runs.folders import verify_folder

    verify_folder(path / "out")


def _model(folder: Path) -> Path:
    from polytope_lp import read_mps, solve
    from polytope_lp.runs.models import model_source, write_model_solution

    lines = ["NAME m", "ROWS", " N c", " L a", "COLUMNS", " x c -1 a 1", "RHS", " b a 2", "ENDATA", ""]
    (folder / "m.mps").write_text("\n".join(lines))
    model, out = read_mps(folder / "m.mps"), folder / "out"
    out.mkdir()
    write_model_solution(model, solve(model.lp), out, model_source(folder / "m.mps", relax=False))
    return folder


def _policy(suffix: str):
    def make(folder: Path) -> Path:
        from polytope_lp import Policy

        Policy(np.array([0.5, 0.0]), 0.01, keys=np.array(["x", "y"])).save(folder / f"policy{suffix}")
        return folder / f"policy{suffix}"

    return make


def _score(path: Path) -> None:
    from polytope_lp import Policy

    policy = Policy.load(path)
    if not policy.needs:
        rows = np.arange(policy.lam.size // policy.resources)
        policy.score(np.ones(rows.size), np.ones((rows.size, policy.resources)).squeeze(), rows)


def _pacing(folder: Path) -> Path:
    plan = {"destination": ["x", "y"], "budget": [1.0, 2.0], "load": [1.0, 1.5], "price": [0.5, 0.0]}
    pq.write_table(pa.table(plan), folder / "prices.parquet")
    pq.write_table(pa.table({"destination": ["x"], "spent": [0.4]}), folder / "spent.parquet")
    return folder


def _read_pacing(path: Path) -> None:
    from polytope_lp.runs.folders import read_prices
    from polytope_lp.serving.pacing import pacing_report, spent_by_row
    from polytope_lp.tables.files import read_table

    plan = read_prices(path)
    pacing_report(plan, spent_by_row(read_table(path / "spent.parquet"), plan), 0.5)


def _candidates(folder: Path) -> Path:
    pq.write_table(pa.table(EDGES), folder / "edges.parquet")
    return _policy(".npz")(folder).parent


def _score_file(path: Path) -> None:
    from polytope_lp import Columns, Policy
    from polytope_lp.tables.scoring import score_file

    score_file(Policy.load(path / "policy.npz"), path / "edges.parquet", Columns(), path / "x.parquet")


def _small():
    from polytope_lp import from_arrow

    return from_arrow(EDGES, BUDGETS)


def _checkpoint(folder: Path) -> Path:
    from polytope_lp import solve

    solve(_small(), 1e-9, evaluations=6, checkpoint=folder / "state.npz", checkpoint_every=1)
    return folder / "state.npz"


def _resume(path: Path) -> None:
    from polytope_lp import solve

    solve(_small(), 1e-9, evaluations=12, checkpoint=path, checkpoint_every=100)


READERS = [
    ("problem folder", _problem, _read_problem),
    ("CSV", _csv, _read_csv),
    ("packed problem", _packed, _read_packed),
    ("solution folder", _solution, _verify),
    ("model folder", _model, _verify),
    ("policy.npz", _policy(".npz"), _score),
    ("policy.json", _policy(".json"), _score),
    ("pacing", _pacing, _read_pacing),
    ("candidates", _candidates, _score_file),
    ("checkpoint", _checkpoint, _resume),
]
