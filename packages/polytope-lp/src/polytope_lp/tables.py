"""From Arrow tables and Parquet files to problems: keys, order, types, and errors that name what is wrong."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from core_tensor.files import read_json, sha256
from numpy.typing import NDArray

from polytope_lp.polytopes import CappedBox
from polytope_lp.problem import MatchingProblem


@dataclass(frozen=True)
class Columns:
    """Names of the columns.

    Attributes:
        source: Source of an edge: integers or strings.
        destination: Destination of an edge and of a budget: integers or strings.
        value: Value of an edge.
        cost: What an edge takes from its destination's budget; absent means one.
        budget: Right-hand side, in the table of budgets.
        sense: `<=` or `=`, in the table of budgets; absent means `<=`.
        upper: Greatest amount of an edge; absent means the polytope's own.
        weight: Weight of an edge in its source's cap; absent means one.
    """

    source: str = "source"
    destination: str = "destination"
    value: str = "value"
    cost: str = "cost"
    budget: str = "budget"
    sense: str = "sense"
    upper: str = "upper"
    weight: str = "weight"


def from_arrow(
    edges: Any,
    budgets: Any,
    polytope: CappedBox | None = None,
    columns: Columns | None = None,
    *,
    allow_unused: bool = False,
) -> MatchingProblem:
    """A problem from two tables: Arrow, pandas, or anything that `pyarrow.table` takes.

    Args:
        edges: Columns source, destination, value, and if needed cost, upper, weight; in any order of rows.
        budgets: Columns destination, budget, and if needed sense.
        polytope: What a source may do; at most one match per source if None.
        columns: Names of the columns.
        allow_unused: Whether budgets without any edge are allowed.

    Returns:
        The problem.
    """
    names = columns or Columns()
    table = _table("edges", edges)
    return _assemble(
        [table.num_rows], lambda: iter(table.to_batches()), table.schema, budgets, polytope, names, allow_unused
    )


def read_problem(
    path: str | Path,
    budgets: str | Path | None = None,
    polytope: CappedBox | None = None,
    columns: Columns | None = None,
    *,
    allow_unused: bool = False,
) -> MatchingProblem:
    """A problem from a folder (`edges/*.parquet`, `budgets.parquet`, `problem.json`) or from Parquet files.

    Edges are streamed; nothing is held twice when they are sorted by source.

    Args:
        path: The folder, or the Parquet file of the edges.
        budgets: Parquet file of the budgets; the folder's own if None.
        polytope: What a source may do; what `problem.json` says (at most one match per source) if None.
        columns: Names of the columns.
        allow_unused: Whether budgets without any edge are allowed.

    Returns:
        The problem.

    Raises:
        ValueError: If a file is missing, corrupt, or does not fit.
    """
    files, budget_file, described = locate(path, budgets)
    if polytope is None:
        polytope = polytope_of(described.get("polytope", {}))
    sources = [_open(file) for file in files]

    def batches() -> Iterator[pa.RecordBatch]:
        for file, source in zip(files, sources, strict=True):
            try:
                yield from source.iter_batches(batch_size=1 << 17)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file}: not a readable Parquet file ({error})") from error

    schema = sources[0].schema_arrow
    for file, source in zip(files, sources, strict=True):
        if not source.schema_arrow.equals(schema):
            raise ValueError(f"{file}: columns or types differ from those of {files[0]}")
    counts = [source.metadata.num_rows for source in sources]
    table = _open(budget_file).read()
    return _assemble(counts, batches, schema, table, polytope, columns or Columns(), allow_unused)


def locate(path: str | Path, budgets: str | Path | None) -> tuple[list[Path], Path, dict[str, Any]]:
    """The files of a problem.

    Args:
        path: A problem folder, or the Parquet file of the edges.
        budgets: Parquet file of the budgets, or None for the folder's own.

    Returns:
        Edge files, budget file, and what `problem.json` says.

    Raises:
        ValueError: If something is missing.
    """
    root = Path(path)
    if root.is_dir():
        files = sorted((root / "edges").glob("*.parquet"))
        if not files:
            raise ValueError(f"{root}: expected edges/*.parquet in the problem folder, found none")
        described = read_json(root / "problem.json") if (root / "problem.json").exists() else {}
        return files, Path(budgets) if budgets else root / "budgets.parquet", described
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder")
    if budgets is None:
        raise ValueError("budgets: expected a Parquet file of budgets beside a Parquet file of edges")
    return [root], Path(budgets), {}


def input_hashes(path: str | Path, budgets: str | Path | None) -> dict[str, str]:
    """SHA-256 of every file of a problem.

    Args:
        path: As in `read_problem`.
        budgets: As in `read_problem`.

    Returns:
        Digest by path.
    """
    files, budget_file, _ = locate(path, budgets)
    return {str(file): sha256(file) for file in [*files, budget_file]}


def polytope_of(described: dict[str, Any]) -> CappedBox:
    """The polytope that a `problem.json` describes.

    Args:
        described: `{"cap": 1.0, "upper": null, "equality": false}`; a cap of null stands for none.

    Returns:
        The polytope.
    """
    cap = described.get("cap", 1.0)
    return CappedBox(
        cap=float("inf") if cap is None else float(cap),
        upper=described.get("upper"),
        equality=bool(described.get("equality", False)),
    )


def _table(name: str, given: Any) -> pa.Table:
    if isinstance(given, pa.Table):
        return given
    if hasattr(given, "columns") and hasattr(given, "iloc"):
        return pa.Table.from_pandas(given, preserve_index=False)
    try:
        return pa.table(given)
    except (TypeError, pa.ArrowException) as error:
        raise TypeError(f"{name}: expected an Arrow or pandas table, got {type(given).__name__} ({error})") from error


def _open(file: Path) -> pq.ParquetFile:
    if not file.exists():
        raise ValueError(f"{file}: no such file")
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable Parquet file ({error})") from error


def _numbers(name: str, column: Any, dtype: Any) -> NDArray[Any]:
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(f"{name}: expected a column of numbers, got {kind}")
    if column.null_count:
        raise ValueError(f"{name}: expected numbers, got {column.null_count} nulls")
    values = np.asarray(column, dtype=dtype)
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name}: expected finite values, got {values[at]} in row {at}")
    return values


class _Keys:
    """Numbers for the keys of the destinations, and for strings of the sources."""

    def __init__(self, table: pa.Table, names: Columns) -> None:
        column = _require(table.schema, table, "budgets", names.destination)
        self.keys = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if self.keys.null_count:
            raise ValueError(f"budgets.{names.destination}: expected keys, got {self.keys.null_count} nulls")
        if len(pc.unique(self.keys)) != len(self.keys):
            raise ValueError(f"budgets.{names.destination}: expected each destination once")
        whole = pa.types.is_integer(self.keys.type)
        self.plain = whole and np.array_equal(np.asarray(self.keys), np.arange(len(self.keys)))

    def rows(self, column: pa.Array) -> NDArray[np.int32]:
        # Row of every key; an unknown one is an error.
        if column.null_count:
            raise ValueError(f"edges.destination: expected keys, got {column.null_count} nulls")
        if self.plain and pa.types.is_integer(column.type):
            numbers = np.asarray(column)
            bad = (numbers < 0) | (numbers >= len(self.keys))
            if bad.any():
                raise ValueError(f"edges.destination: {numbers[bad][0]} has no budget")
            return numbers.astype(np.int32)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        try:
            found = pc.index_in(column.cast(self.keys.type), self.keys)
        except pa.ArrowException as error:
            raise ValueError(
                f"edges.destination: {column.type} keys do not fit the {self.keys.type} keys of the budgets"
            ) from error
        if found.null_count:
            unknown = column.filter(pc.is_null(found))[0].as_py()
            raise ValueError(f"edges.destination: {unknown!r} has no budget")
        return np.asarray(found, dtype=np.int32)


def _require(schema: pa.Schema, holder: Any, table: str, name: str) -> Any:
    if schema.get_field_index(name) < 0:
        raise ValueError(f"{table}: expected a column {name!r}, got {', '.join(schema.names)}")
    return holder.column(name)


class _Sources:
    """Runs of equal source keys, in the order of the rows."""

    def __init__(self) -> None:
        self.starts: list[NDArray[np.int64]] = []
        self.keys: list[Any] = []
        self.seen, self.rising = 0, True
        self.last: Any = None

    def add(self, column: Any) -> None:
        if column.null_count:
            raise ValueError(f"edges.source: expected keys, got {column.null_count} nulls")
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_integer(column.type):
            numbers = np.asarray(column)
            change = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
            self.rising &= bool((numbers[1:] >= numbers[:-1]).all())
            self.rising &= self.last is None or bool(numbers[0] >= self.last)
            first = self.last is None or numbers[0] != self.last
            self.last = numbers[-1]
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            change = np.flatnonzero(np.asarray(pc.not_equal(column[1:], column[:-1]))) + 1
            first = self.last is None or column[0].as_py() != self.last
            self.last = column[-1].as_py()
        else:
            raise ValueError(f"edges.source: expected integers or strings, got {column.type}")
        at = np.concatenate([[0], change]) if first else change
        self.starts.append(at + self.seen)
        self.keys.append(column.take(pa.array(at)))
        self.seen += len(column)

    def finish(self) -> tuple[NDArray[np.int64], Any, NDArray[np.int64] | None]:
        # Offsets, keys, and the order that brings equal sources together (None if they are).
        starts = np.concatenate([*self.starts, [self.seen]]).astype(np.int64)
        keys = pa.chunked_array(self.keys).combine_chunks()
        self.starts.clear()
        self.keys.clear()
        if self.rising and pa.types.is_integer(keys.type):
            return starts, keys, None
        encoded = keys.dictionary_encode()
        codes, distinct = np.asarray(encoded.indices), encoded.dictionary
        if len(distinct) == len(keys):
            return starts, keys, None
        lengths = np.diff(starts)
        order = np.argsort(codes, kind="stable")
        total = np.bincount(codes, lengths, len(distinct)).astype(np.int64)
        runs = np.repeat(starts[:-1][order] - np.cumsum(lengths[order]) + lengths[order], lengths[order])
        return np.concatenate([[0], np.cumsum(total)]), distinct, runs + np.arange(self.seen)


def _assemble(
    counts: list[int],
    batches: Any,
    schema: pa.Schema,
    budgets: Any,
    polytope: CappedBox | None,
    names: Columns,
    allow_unused: bool,
) -> MatchingProblem:
    table = _table("budgets", budgets)
    keys = _Keys(table, names)
    b = _numbers(f"budgets.{names.budget}", _require(table.schema, table, "budgets", names.budget), np.float64)
    total = sum(counts)
    if total == 0:
        raise ValueError("edges: expected at least one edge, got none")
    for name in (names.source, names.destination, names.value):
        if schema.get_field_index(name) < 0:
            raise ValueError(f"edges: expected a column {name!r}, got {', '.join(schema.names)}")
    single = pa.types.is_float32(schema.field(names.value).type)
    dtype = np.float32 if single else np.float64
    extra = [n for n in (names.cost, names.upper, names.weight) if schema.get_field_index(n) >= 0]
    arrays = {name: np.empty(total, dtype) for name in (names.value, *extra)}
    index = np.empty(total, np.int32)
    sources, at = _Sources(), 0
    for batch in batches():
        if batch.num_rows == 0:
            continue
        to = slice(at, at + batch.num_rows)
        sources.add(batch.column(names.source))
        index[to] = keys.rows(batch.column(names.destination))
        for name, array in arrays.items():
            array[to] = _numbers(f"edges.{name}", batch.column(name), dtype)
        at += batch.num_rows
    offsets, source_keys, order = sources.finish()
    if order is not None:
        index = index[order]
        arrays = {name: array[order] for name, array in arrays.items()}
    shape = polytope or CappedBox()
    if names.upper in arrays or names.weight in arrays:
        shape = CappedBox(
            shape.cap,
            torch.from_numpy(arrays[names.upper]) if names.upper in arrays else shape.upper,
            torch.from_numpy(arrays[names.weight]) if names.weight in arrays else None,
            shape.equality,
        )
    return MatchingProblem.from_arrays(
        offsets,
        index,
        arrays.pop(names.value),
        arrays.get(names.cost),
        b,
        shape,
        equality=_senses(table, names),
        source_keys=_plain_keys(source_keys),
        destination_keys=None if keys.plain else keys.keys,
        allow_unused=allow_unused,
    )


def _senses(table: pa.Table, names: Columns) -> NDArray[np.bool_] | None:
    if table.schema.get_field_index(names.sense) < 0:
        return None
    senses = table.column(names.sense).to_pylist()
    wrong = [s for s in senses if s not in {"<=", "="}]
    if wrong:
        raise ValueError(f"budgets.{names.sense}: expected '<=' or '=', got {wrong[0]!r}")
    return np.array([s == "=" for s in senses])


def _plain_keys(keys: Any) -> Any:
    # None where the keys are 0, 1, 2, ..., which need not be stored.
    if pa.types.is_integer(keys.type) and np.array_equal(np.asarray(keys), np.arange(len(keys))):
        return None
    return keys
