"""From Arrow tables and Parquet files to problems: keys, order, types, and errors that name what is wrong."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from core_tensor.app.files import read_json, sha256
from numpy.typing import NDArray

from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.polytopes import CappedBox
from polytope_lp.tables.columns import Columns, columns_of, names_of
from polytope_lp.tables.files import EdgeFile, parts, read_table
from polytope_lp.tables.keys import Keys, Sources, key_column, numbers, places, require, value_dtype
from polytope_lp.tables.packed import DESCRIPTION, is_packed, open_packed

Allocate = Callable[[str, tuple[int, ...], np.dtype[Any]], NDArray[Any]]
"""Makes an array of the edges from its name, shape and dtype: in memory, or in a file."""

_OBJECTIVE = ""
_LIMIT, _GUARANTEE = "sense of the budget", "sense of the minimum"
SENSES = ("<=", "=", ">=")
ON_PROBLEM = ("polytope", "columns")
"""What a `problem.json` may say."""


def _in_memory(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:  # noqa: ARG001
    return np.empty(shape, dtype)


def from_arrow(
    edges: Any,
    budgets: Any,
    polytope: CappedBox | None = None,
    columns: Columns | None = None,
    *,
    sources: Any = None,
    allow_unused: bool = False,
) -> MatchingProblem:
    """A problem from two or three tables: Arrow, pandas, polars, or anything that `pyarrow.table` takes.

    Args:
        edges: Columns source, destination, value, and if needed cost, upper, weight; in any order of rows.
        budgets: Columns destination, budget, and if needed sense.
        polytope: What a source may do; at most one match per source if None.
        columns: Names of the columns.
        sources: Columns source and cap, where caps differ; sources without edges are skipped and counted.
        allow_unused: Whether budgets without any edge are allowed.

    Returns:
        The problem.

    Raises:
        ValueError: If a column is missing, or a value, key or order does not fit.
        TypeError: If an argument is not a table.
    """
    names = columns or Columns()
    table = _table("edges", edges)
    whole = None if sources is None else _table("sources", sources)
    return _assemble(
        [table.num_rows],
        lambda: iter(table.to_batches()),
        [table.schema],
        _table("budgets", budgets),
        whole,
        polytope,
        names,
        allow_unused,
        _in_memory,
    )


def read_problem(
    path: str | Path,
    budgets: str | Path | None = None,
    polytope: CappedBox | None = None,
    columns: Columns | None = None,
    *,
    sources: str | Path | None = None,
    allow_unused: bool = False,
    allocate: Allocate | None = None,
) -> MatchingProblem:
    """A problem from a folder (`edges/**/*.parquet`, `budgets.parquet`, `problem.json`), or from Parquet or CSV files.

    A folder that `polytope_lp.pack` wrote is mapped, not read.

    A folder may also hold `sources.parquet` (source and cap), and `problem.json` the names of columns in `columns`.
    Edges may be in subfolders such as `edges/date=2026-01-31/`, whose names then become a column; files may differ
    in the order of their columns and in the width of their numbers. Keys in CSV files are text.

    Edges are streamed; nothing is held twice when they are sorted by source.

    Args:
        path: The folder, or the file of the edges.
        budgets: File of the budgets; the folder's own if None.
        polytope: What a source may do; what `problem.json` says (at most one match per source) if None.
        columns: Names of the columns; those of `problem.json` if None.
        sources: File of the sources' caps; the folder's own if None.
        allow_unused: Whether budgets without any edge are allowed.
        allocate: Makes the arrays of the edges from name, shape and dtype; `numpy.empty` if None.

    Returns:
        The problem.

    Raises:
        ValueError: If a file is missing, corrupt, or does not fit.
    """
    if is_packed(path):
        return open_packed(path)
    files, budget_file, described = locate(path, budgets)
    if polytope is None:
        polytope = polytope_of(described.get("polytope", {}))
    if columns is None:
        columns = columns_of(described.get("columns", {}))
    caps = Path(path) / "sources.parquet" if sources is None else Path(sources)
    caps_table = read_table(caps, columns) if sources is not None or caps.exists() else None
    edges = [EdgeFile.open(file, columns) for file in files]
    for file in edges:
        file.check(columns, edges[0].schema)

    def batches() -> Iterator[pa.RecordBatch]:
        for file in edges:
            yield from file.batches()

    return _assemble(
        [file.rows for file in edges],
        batches,
        [file.schema for file in edges],
        read_table(budget_file, columns),
        caps_table,
        polytope,
        columns,
        allow_unused,
        allocate or _in_memory,
    )


def locate(path: str | Path, budgets: str | Path | None) -> tuple[list[Path], Path, dict[str, Any]]:
    """The files of a problem.

    Args:
        path: A problem folder, or the file or folder of the edges.
        budgets: File of the budgets, or None for the folder's own.

    Returns:
        Edge files, budget file, and what `problem.json` says.

    Raises:
        ValueError: If something is missing.
    """
    root = Path(path)
    if is_packed(root):
        return [], root / DESCRIPTION, {}
    if root.is_dir():
        # with budgets of its own, a folder without edges/ is a table of edges, as Spark writes them
        own = (root / "edges").is_dir() or budgets is None
        files = parts(root / "edges" if own else root)
        if not files or not files[0].exists():
            raise ValueError(f"{root}: expected edges/*.parquet in the problem folder, found none")
        described = read_json(root / "problem.json") if (root / "problem.json").exists() else {}
        if not isinstance(described, dict) or not all(isinstance(described.get(k, {}), dict) for k in ON_PROBLEM):
            raise ValueError(f"{root / 'problem.json'}: expected an object with {' and '.join(ON_PROBLEM)}")
        return files, Path(budgets) if budgets else root / "budgets.parquet", described
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder")
    if budgets is None:
        raise ValueError("budgets: expected a file of budgets beside a file of edges")
    return [root], Path(budgets), {}


def input_hashes(path: str | Path, budgets: str | Path | None, sources: str | Path | None = None) -> dict[str, str]:
    """SHA-256 of every file of a problem; of a packed one that of its description, which holds those of the others.

    Args:
        path: As in `read_problem`.
        budgets: As in `read_problem`.
        sources: As in `read_problem`.

    Returns:
        Digest by path.
    """
    files, budget_file, _ = locate(path, budgets)
    more = [Path(sources) if sources else Path(path) / "sources.parquet", Path(path) / "problem.json"]
    tables = [budget_file, *(file for file in more if file.exists())]
    return {str(file): sha256(file) for file in [*files, *(file for table in tables for file in parts(table))]}


def overridden(path: str | Path, budgets: str | Path | None, cap: float | None, upper: float | None) -> dict[str, Any]:
    """What a `problem.json` says of the polytope, with its cap or upper bound replaced.

    Args:
        path: As in `read_problem`.
        budgets: As in `read_problem`.
        cap: Cap of every source, infinite for none; the problem's own if None.
        upper: Upper bound of every edge; the problem's own if None.

    Returns:
        A description for `polytope_of`.
    """
    described: dict[str, Any] = dict(locate(path, budgets)[2].get("polytope", {}))
    if cap is not None:
        described["cap"] = None if np.isinf(cap) else cap
    if upper is not None:
        described["upper"] = None if np.isinf(upper) else upper
    return described


def polytope_of(described: dict[str, Any]) -> CappedBox:
    """The polytope that a `problem.json` describes.

    Args:
        described: `{"cap": 1.0, "upper": null, "equality": false}`; a cap of null means none.

    Returns:
        The polytope.

    Raises:
        ValueError: If a value is neither a number nor null, or `equality` neither true nor false.
    """
    cap, upper, equality = (described.get(*default) for default in (("cap", 1.0), ("upper", None), ("equality", False)))
    for name, value in (("cap", cap), ("upper", upper)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"polytope.{name}: expected a number or null, got {value!r}")
    if not isinstance(equality, bool):
        raise ValueError(f"polytope.equality: expected true or false, got {equality!r}")
    return CappedBox(
        cap=float("inf") if cap is None else float(cap),
        upper=None if upper is None else float(upper),
        equality=equality,
    )


def _table(name: str, given: Any) -> pa.Table:
    if isinstance(given, pa.Table):
        return given
    if hasattr(given, "columns") and hasattr(given, "iloc"):
        return pa.Table.from_pandas(given, preserve_index=False)
    try:
        return pa.table(given)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise TypeError(
            f"{name}: expected a table (Arrow, pandas, polars, duckdb), got {type(given).__name__} ({error})"
        ) from error


@dataclass
class _Edges:
    """The edges as arrays, in the order of the rows.

    Attributes:
        index: Rows of A, shape (edges,) or (edges, rows per edge), int32.
        arrays: Costs, upper bounds and weights by column, and the negated values by `_OBJECTIVE`.
        costs: Columns of the costs; None where they are ones.
        sources: Runs of equal sources.
    """

    index: NDArray[np.int32]
    arrays: dict[str, NDArray[Any]]
    costs: list[str | None]
    sources: Sources

    @classmethod
    def read(
        cls, total: int, batches: Any, schemas: list[pa.Schema], keys: Keys, names: Columns, allocate: Allocate
    ) -> "_Edges":
        rows, costs, schema = names_of(names.destination), names_of(names.cost), schemas[0]
        for name in (names.source, *rows, names.value):
            require(schema, schema.empty_table(), "edges", name)
        dtype = value_dtype([each.field(names.value).type for each in schemas])
        there = [name if names.optional(name, schema, "edges") else None for name in costs]
        extra = [name for name in (names.upper, names.weight) if names.optional(name, schema, "edges")]
        columns = {_OBJECTIVE: names.value} | {name: name for name in (*there, *extra) if name}
        arrays = {key: allocate(f"edges-{i}", (total,), np.dtype(dtype)) for i, key in enumerate(columns)}
        per_edge = len(rows) * len(names_of(names.budget))
        index = allocate("index", (total,) if per_edge == 1 else (total, per_edge), np.dtype(np.int32))
        sources, at = Sources(), 0
        for batch in batches():
            if batch.num_rows == 0:
                continue
            to = slice(at, at + batch.num_rows)
            sources.add(batch.column(names.source))
            found = [keys.rows(batch.column(name)) for name in rows]
            if per_edge == 1:
                index[to] = found[0]
            else:  # several destinations, or row k * destinations + j for budget k of destination j
                shifts = [0] * len(rows) if len(rows) > 1 else [k * len(keys.keys) for k in range(per_edge)]
                for k, shift in enumerate(shifts):
                    index[to, k] = found[k if len(rows) > 1 else 0] + shift
            for key, array in arrays.items():
                array[to] = numbers(f"edges.{columns[key]}", require(batch.schema, batch, "edges", columns[key]), dtype)
            np.negative(arrays[_OBJECTIVE][to], out=arrays[_OBJECTIVE][to])  # values are maximized
            at += batch.num_rows
        return cls(index, arrays, there * (per_edge if len(there) == 1 else 1), sources)

    def sorted(self) -> tuple[NDArray[np.int64], Any]:
        # Bring equal sources together; offsets and keys.
        offsets, source_keys, order = self.sources.finish()
        if order is not None:
            self.index = self.index[order]
            self.arrays = {name: array[order] for name, array in self.arrays.items()}
        return offsets, source_keys

    def cost(self) -> NDArray[Any] | None:
        # Coefficients in the shape of the index, or None for ones.
        if not any(self.costs):
            return None
        if self.index.ndim == 1:
            return self.arrays[str(self.costs[0])]
        ones = np.ones(self.index.shape[0], next(iter(self.arrays.values())).dtype)
        return np.stack([ones if name is None else self.arrays[name] for name in self.costs], axis=1)


def _assemble(
    counts: list[int],
    batches: Any,
    schemas: list[pa.Schema],
    table: pa.Table,
    caps: pa.Table | None,
    polytope: CappedBox | None,
    names: Columns,
    allow_unused: bool,
    allocate: Allocate,
) -> MatchingProblem:
    table, names = _ranges(table, names)
    keys = Keys(table, names)
    budgets = names_of(names.budget)
    b = [numbers(f"budgets.{n}", require(table.schema, table, "budgets", n), np.float64) for n in budgets]
    if sum(counts) == 0:
        raise ValueError("edges: expected at least one edge, got none")
    edges = _Edges.read(sum(counts), batches, schemas, keys, names, allocate)
    offsets, source_keys = edges.sorted()
    shape, lonely = polytope or CappedBox(), 0
    if caps is not None:
        shape, lonely = _capped(shape, caps, source_keys, names)
    arrays = edges.arrays
    upper, weight = (torch.from_numpy(arrays[n]) if n in arrays else None for n in (names.upper, names.weight))
    if upper is not None or weight is not None:
        shape = CappedBox(shape.cap, shape.upper if upper is None else upper, weight, shape.equality)
    if len(names_of(names.destination)) > 1:
        _refuse_equal_edges(offsets, edges.index[:, 0], source_keys, keys)
    problem = MatchingProblem.from_arrays(
        offsets,
        edges.index,
        arrays[_OBJECTIVE],
        edges.cost(),
        np.concatenate(b),
        shape,
        **_senses(table, names),
        source_keys=_plain_keys(source_keys),
        destination_keys=None if keys.plain else keys.keys,
        resources=budgets if len(budgets) > 1 else (),
        allow_unused=allow_unused,
        minimize=True,
    )
    return dataclasses.replace(problem, skipped=problem.skipped + lonely)


def _capped(shape: CappedBox, caps: pa.Table, source_keys: Any, names: Columns) -> tuple[CappedBox, int]:
    # The caps in the order of the sources, and the number of sources without edges.
    if isinstance(shape.cap, torch.Tensor) and shape.cap.numel() > 1:
        raise ValueError("sources: expected caps in the polytope or in the table of sources, got both")
    keys = key_column(caps, "sources", names.source)
    values = numbers(f"sources.{names.cap}", require(caps.schema, caps, "sources", names.cap), np.float64)
    at = places(f"sources.{names.source}", source_keys, keys, "of the edges has no cap")
    if (values < 0).any():
        raise ValueError(f"sources.{names.cap}: expected values of at least 0, got {values.min()}")
    return dataclasses.replace(shape, cap=torch.from_numpy(values[at])), len(keys) - len(source_keys)


def _refuse_equal_edges(offsets: NDArray[np.int64], first: NDArray[np.int32], source_keys: Any, keys: Keys) -> None:
    # The first destination names an edge in the primal, so a source may have it only once.
    block = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    order = np.lexsort((first, block))
    equal = (np.diff(block[order]) == 0) & (np.diff(first[order]) == 0)
    if equal.any():
        at = order[int(np.flatnonzero(equal)[0])]
        source, row = source_keys[int(block[at])].as_py(), keys.keys[int(first[at])].as_py()
        raise ValueError(f"edges: the edge from source {source} to first destination {row} appears twice")


def _ranges(table: pa.Table, names: Columns) -> tuple[pa.Table, Columns]:
    # A budget with a minimum beside it is two budgets of one cost, a limit and a guarantee.
    if not names.optional(names.minimum, table.schema, "budgets"):
        return table, names
    rows, costs, budgets = names_of(names.destination), names_of(names.cost), names_of(names.budget)
    senses = set(table.column(names.sense).to_pylist()) if names.sense in table.schema.names else {"<="}
    if len(rows) > 1 or len(budgets) > 1 or senses - {"<="}:
        raise ValueError(f"budgets.{names.minimum}: expected one budget per destination, with sense <=")
    least = numbers(f"budgets.{names.minimum}", table.column(names.minimum).fill_null(0), np.float64)
    most = numbers(f"budgets.{budgets[0]}", require(table.schema, table, "budgets", budgets[0]), np.float64)
    if (least > most).any():
        at = int(np.flatnonzero(least > most)[0])
        raise ValueError(f"budgets.{names.minimum}: {least[at]} in row {at} is above the budget {most[at]}")
    table = table.set_column(table.schema.names.index(names.minimum), names.minimum, pa.array(least))
    for name, sense in ((_LIMIT, "<="), (_GUARANTEE, ">=")):
        table = table.append_column(name, pa.array([sense] * table.num_rows))
    both: dict[str, Any] = {
        "budget": (budgets[0], names.minimum),
        "cost": (costs[0], costs[0]),
        "sense": (_LIMIT, _GUARANTEE),
    }
    return table, dataclasses.replace(names, **both)


def _senses(table: pa.Table, names: Columns) -> dict[str, NDArray[np.bool_]]:
    # Which rows are equations, and which budgets are minimums.
    columns, count = names_of(names.sense), len(names_of(names.budget))
    parts: list[list[Any]] = []
    for name in columns:
        there = names.optional(name, table.schema, "budgets")
        parts.append(require(table.schema, table, "budgets", name).to_pylist() if there else ["<="] * table.num_rows)
        wrong = [s for s in parts[-1] if s not in SENSES]
        if wrong:
            raise ValueError(f"budgets.{name}: expected one of {', '.join(SENSES)}, got {wrong[0]!r}")
    senses = np.array(parts * (count // len(columns)), dtype=str).reshape(-1)
    return {"equality": senses == "=", "at_least": senses == ">="}


def _plain_keys(keys: Any) -> Any:
    # None where the keys are 0, 1, 2, ..., which need not be stored.
    if pa.types.is_integer(keys.type) and np.array_equal(np.asarray(keys), np.arange(len(keys))):
        return None
    return keys
