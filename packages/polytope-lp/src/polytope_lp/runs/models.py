"""Folders of solved MPS models: what was found, in the names of the file, and what proves it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from core_tensor.app.files import atomic_path, read_json, reading, sha256, write_json
from numpy.typing import NDArray

from polytope_lp.general.block_solution import BlockSolution
from polytope_lp.general.mps import MpsModel, read_mps
from polytope_lp.general.verify_blocks import verify_blocks
from polytope_lp.tables.files import read_table

Array = NDArray[np.float64]
NUMBERS = ("objective", "lower_bound", "upper_bound", "gap", "max_violation", "dual_residual", "value", "bound")
FORMS = {"status": str, "engine": str, "tol": float, "seconds": float, "iterations": int, "newton": int}


def is_model(path: Path) -> bool:
    """Whether a file is an MPS model, by its name.

    Args:
        path: The file.

    Returns:
        True for `.mps` and `.mps.gz`.
    """
    return path.name.lower().endswith((".mps", ".mps.gz"))


def model_certificate(model: MpsModel, solution: BlockSolution) -> dict[str, Any]:
    """The claims of a solved model: those of its LP, and `value` and `bound` in the sense of the file.

    Args:
        model: The model.
        solution: Its solution.

    Returns:
        As JSON; infinities, and every figure of an infeasible model, are null.
    """
    claims = solution.certificate()
    if solution.status == "infeasible":
        claims |= dict.fromkeys(NUMBERS)
    own = {
        name: None if claims[of] is None else model.value(claims[of])
        for name, of in (("value", "objective"), ("bound", "lower_bound"))
    }
    return {"status": claims.pop("status"), **own, **claims}


def write_model_solution(model: MpsModel, solution: BlockSolution, out: Path, source: dict[str, Any]) -> None:
    """Write variables.parquet, rows.parquet, input.json and certificate.json.

    Args:
        model: The model.
        solution: Its solution.
        out: Folder to write to.
        source: What `model_source` gave for the file.
    """
    lp, sign = model.lp, model.signs
    proof = {"infeasible": "rows", "unbounded": "variables"}.get(solution.status)
    rays = {name: solution.ray if name == proof else None for name in ("rows", "variables")}
    reduced = (-1.0 if model.maximize else 1.0) * (lp.c + lp.A.T @ solution.lam)
    variables = {"variable": pa.array(model.columns), "x": solution.x, "reduced_cost": reduced}
    sides = np.where(np.arange(lp.b.size) >= lp.inequalities, "=", np.where(sign > 0, "<=", ">="))
    rows = {"row": pa.array(model.rows, pa.string()), "side": pa.array(sides.tolist(), pa.string())}
    rows |= {"limit": sign * lp.b, "activity": sign * (lp.A @ solution.x), "dual": model.duals(solution.lam)}
    for name, table in (("variables", variables), ("rows", rows)):
        columns = table if rays[name] is None else table | {"ray": rays[name]}
        with atomic_path(out / f"{name}.parquet") as temporary:
            pq.write_table(pa.table(columns), temporary)
    write_json(out / "input.json", source)
    write_json(out / "certificate.json", model_certificate(model, solution))


def model_source(path: Path, *, relax: bool) -> dict[str, Any]:
    """What a solution was made from.

    Args:
        path: The MPS file.
        relax: Whether integer variables were taken as continuous.

    Returns:
        The file, its digest, and `relax`.
    """
    return {"model": str(path.resolve()), "sha256": sha256(path), "relax": relax}


def verify_model(out: Path) -> dict[str, Any]:
    """Recompute the claims of a solved model from its file, without the solver.

    Args:
        out: Folder that `write_model_solution` wrote.

    Returns:
        See `polytope_lp.general.verify_blocks.verify_blocks`; `input_unchanged` says whether the file is the same.

    Raises:
        ValueError: If a file is missing or unreadable.
    """
    with reading(out / "input.json", "the input of a solution"):
        source = read_json(out / "input.json")
        if {name: type(value) for name, value in source.items()} != {"model": str, "sha256": str, "relax": bool}:
            raise ValueError("expected model, sha256 and relax")
    model, claims = read_mps(source["model"], relax=source["relax"]), _claims(out / "certificate.json")
    x, ray_x = _columns(out / "variables.parquet", "variable", model.columns, "x")
    dual, ray_rows = _columns(out / "rows.parquet", "row", model.rows, "dual")
    lam = model.multipliers(dual)
    ray = ray_rows if claims["status"] == "infeasible" else ray_x
    result = verify_blocks(model.lp, x, lam, ray, claims)
    lines: list[str] = result["problems"]
    if claims["status"] == "infeasible":
        lines += [
            f"{name}: expected null where the model is infeasible" for name in NUMBERS if claims[name] is not None
        ]
    for name, of in (("value", "objective"), ("bound", "lower_bound")):
        if claims[name] != (None if claims[of] is None else model.value(claims[of])):
            lines.append(f"{name}: not that of the {of}, in the sense of the file")
    unchanged = sha256(Path(source["model"])) == source["sha256"]
    if not unchanged:
        lines.append("the input's files have changed since it was solved")
    figures = {name: None if value in (math.inf, -math.inf) else value for name, value in result.items()}
    return figures | {"ok": not lines, "input_unchanged": unchanged}


def _claims(file: Path) -> dict[str, Any]:
    """A certificate with every field there, of its type."""
    with reading(file, "a certificate"):
        claims: dict[str, Any] = read_json(file)
        if set(claims) != {*NUMBERS, *FORMS}:
            raise ValueError(f"expected the fields {', '.join((*FORMS, *NUMBERS))}")
        for name, value in claims.items():
            kind = FORMS.get(name, float)
            fits = type(value) is kind or (kind is float and type(value) is int) or (name in NUMBERS and value is None)
            if not fits or (kind is not str and value is not None and not math.isfinite(value)):
                raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}")
    return claims


def _columns(file: Path, key: str, names: tuple[str, ...], column: str) -> tuple[Array, Array | None]:
    """A column of numbers of a table whose keys are those of the model, and the ray beside it."""
    table = read_table(file)
    with reading(file, "a table of a solution"):
        if table.column(key).to_pylist() != list(names):
            raise ValueError(f"expected the {key}s of the model, in its order")
        found = [
            np.asarray(table.column(name).combine_chunks(), dtype=np.float64) if name in table.column_names else None
            for name in (column, "ray")
        ]
        if found[0] is None or not all(each is None or np.isfinite(each).all() for each in found):
            raise ValueError(f"expected finite numbers in column {column!r}")
        return found[0], found[1]
