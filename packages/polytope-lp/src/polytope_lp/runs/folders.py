"""The folders of the command line: generated problems, and solutions with their certificate and input."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from core_tensor.app.files import atomic_path, read_json, write_json
from numpy.typing import NDArray

from polytope_lp.matching.generate import Budgets, EdgeBatch, Marketplace, edge_batches
from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.matching.solution import Solution
from polytope_lp.matching.verify import check_claims
from polytope_lp.serving.policy import Policy
from polytope_lp.tables.columns import columns_of
from polytope_lp.tables.tables import input_hashes, polytope_of, read_problem, read_table

BATCHES_PER_FILE = 64
EDGES = pa.schema(
    [("source", pa.int64()), ("destination", pa.int32()), ("value", pa.float32()), ("cost", pa.float32())]
)


def write_marketplace(market: Marketplace, folder: str | Path, progress: Any = iter) -> int:
    """Generate a problem folder as a stream: `edges/*.parquet`, `budgets.parquet`, `problem.json`.

    Args:
        market: What to generate.
        folder: Where; created if it is not there, and refused if it holds a problem.
        progress: Wraps the iterator of batches.

    Returns:
        Number of edges.

    Raises:
        ValueError: If the folder already holds edges, or the kind has several rows per edge.
    """
    root = Path(folder)
    if any((root / "edges").glob("*.parquet")):
        raise ValueError(f"{root}: already holds a problem; choose another folder")
    if market.rows_per_edge > 1:
        raise ValueError(f"kind: {market.kind!r} has several rows per edge, which a table of edges cannot hold")
    budgets, edges = Budgets(market), 0
    used = np.zeros(market.destinations, dtype=bool)
    batches = iter(progress(edge_batches(market)))
    for number in count():
        first = next(batches, None)
        if first is None:
            break
        with _writer(root / "edges" / f"{number:05d}.parquet") as put:
            for batch in chain([first], islice(batches, BATCHES_PER_FILE - 1)):
                put(batch)
                budgets.add(batch)
                used[batch.destination] = True
                edges += batch.source.size
    keep = np.flatnonzero(used)
    table = pa.table({"destination": keep.astype(np.int32), "budget": budgets.finish()[keep]})
    with atomic_path(root / "budgets.parquet") as temporary:
        pq.write_table(table, temporary)
    write_json(
        root / "problem.json",
        {"polytope": {"cap": 1.0, "upper": None, "equality": False}, "generator": vars(market), "edges": edges},
    )
    return edges


@contextmanager
def _writer(path: Path) -> Iterator[Callable[[EdgeBatch], None]]:
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, EDGES, compression="none") as file:
        yield lambda batch: file.write_batch(
            pa.record_batch([batch.source, batch.destination, batch.value, batch.cost], schema=EDGES)
        )


def write_solution(
    solution: Solution,
    out: str | Path,
    path: str | Path,
    budgets: str | Path | None,
    read: dict[str, Any],
    sources: str | Path | None = None,
) -> None:
    """Write a solution: primal (Arrow stream), prices, certificate, history, policy, and what it was made from.

    Args:
        solution: The solution.
        out: Folder to write to.
        path: The problem's folder or edge file.
        budgets: The problem's budget file, or None.
        read: How the problem was read: arguments of `read_problem` as JSON.
        sources: The problem's file of sources, or None.
    """
    root = Path(out)
    reader = solution.primal()
    with (
        atomic_path(root / "primal.arrow") as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, reader.schema) as stream,
    ):
        for batch in reader:
            stream.write_batch(batch)
    with atomic_path(root / "prices.parquet") as temporary:
        pq.write_table(solution.prices(), temporary)
    with atomic_path(root / "history.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(solution.history), temporary)
    Policy.from_solution(solution).save(root / "policy.npz")
    write_json(
        root / "input.json",
        {
            "path": str(Path(path).resolve()),
            "budgets": None if budgets is None else str(Path(budgets).resolve()),
            "sources": None if sources is None else str(Path(sources).resolve()),
            "read": read,
            "sha256": input_hashes(Path(path).resolve(), budgets and Path(budgets).resolve(), sources),
        },
    )
    write_json(root / "certificate.json", solution.certificate())


def verify_folder(out: str | Path) -> dict[str, Any]:
    """Recompute the claims of a solution folder from its input, without the solver.

    Args:
        out: Folder that `write_solution` wrote.

    Returns:
        See `polytope_lp.matching.verify.check_claims`; `input_unchanged` says whether the input's digests still hold.

    Raises:
        ValueError: If a file is missing or unreadable.
    """
    root = Path(out)
    if not (root / "certificate.json").exists():
        raise ValueError(f"{root}: expected a solution folder with certificate.json")
    given, claims = read_json(root / "input.json"), read_json(root / "certificate.json")
    problem = problem_again(given)
    try:
        with pa.OSFile(str(root / "primal.arrow"), "rb") as file:
            primal = pa.ipc.open_stream(file).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{root}: not a readable solution ({error})") from error
    prices = read_prices(root)
    lam = np.asarray(prices.column("price"), dtype=np.float64)
    if lam.shape[0] != problem.rows:
        raise ValueError(f"{root}: prices of {lam.shape[0]} destinations, but the problem has {problem.rows}")
    result = check_claims(problem, dense_primal(problem, primal), lam, claims)
    digests = input_hashes(given["path"], given["budgets"], given["sources"])
    result["input_unchanged"] = sorted(digests.values()) == sorted(given["sha256"].values())
    if not result["input_unchanged"]:
        result["ok"] = False
        result["problems"].append("the input's files have changed since it was solved")
    return result


def problem_again(given: dict[str, Any]) -> MatchingProblem:
    """Read the problem that an `input.json` names.

    Args:
        given: Content of the file.

    Returns:
        The problem.
    """
    read = given["read"]
    return read_problem(
        given["path"],
        given["budgets"],
        None if read.get("polytope") is None else polytope_of(read["polytope"]),
        columns_of(read["columns"]) if read.get("columns") else None,
        sources=given.get("sources"),
        allow_unused=read.get("allow_unused", False),
    )


def read_prices(out: str | Path) -> pa.Table:
    """The prices of a solution folder, checked.

    Args:
        out: Folder that `write_solution` wrote.

    Returns:
        What `Solution.prices` gave.

    Raises:
        ValueError: If the file is missing or unreadable, or lacks a column.
    """
    file = Path(out) / "prices.parquet"
    prices = read_table(file)
    for name, kind in (("budget", "float"), ("load", "float"), ("price", "float"), ("destination", None)):
        if name not in prices.column_names:
            raise ValueError(f"{file}: expected a column {name!r}, got {', '.join(prices.column_names)}")
        column = prices.column(name)
        if kind and (not pa.types.is_floating(column.type) or column.null_count):
            raise ValueError(f"{file}: expected numbers without nulls in column {name!r}")
    return prices


def dense_primal(problem: MatchingProblem, primal: pa.Table) -> NDArray[np.float64]:
    """The amounts of a primal table in the order of the problem's edges.

    Args:
        problem: The problem.
        primal: Columns source, destination, x.

    Returns:
        Shape (variables,), float64.

    Raises:
        ValueError: If the table names an edge that the problem does not have, or names one twice.
    """
    import pyarrow.compute as pc

    def numbers(column: Any, keys: Any) -> NDArray[np.int64]:
        if keys is None:
            return np.asarray(column, dtype=np.int64)
        return np.asarray(pc.index_in(column, keys).fill_null(-1), dtype=np.int64)

    block = numbers(primal.column("source"), problem.source_keys)
    row = numbers(primal.column("destination"), problem.destination_keys)
    offsets = problem.data.offsets.numpy()
    rows = problem.data.index.reshape(problem.data.variables, -1)[:, 0].numpy()
    x = np.zeros(problem.data.variables)
    if block.size and not (0 <= block.min() <= block.max() < problem.data.blocks and row.min() >= 0):
        raise ValueError("primal: names a source or destination that the problem does not have")
    first = 0
    values = np.asarray(primal.column("x"), dtype=np.float64)
    for begin, end in problem.pieces():
        last = int(np.searchsorted(block, end))
        if np.any(np.diff(block[first:last]) < 0) or np.any(block[first:last] < begin):
            raise ValueError("primal: expected rows in the order of the sources")
        low, high = offsets[begin], offsets[end]
        owner = np.repeat(np.arange(begin, end), np.diff(offsets[begin : end + 1]))
        key = owner * problem.rows + rows[low:high]
        order = np.argsort(key, kind="stable")
        wanted = block[first:last] * problem.rows + row[first:last]
        at = np.searchsorted(key, wanted, sorter=order)
        at = order[np.minimum(at, order.size - 1)]
        if not np.array_equal(key[at], wanted) or np.unique(at).size != at.size:
            raise ValueError("primal: names an edge that the problem does not have, or one edge twice")
        x[low + at] = values[first:last]
        first = last
    return x
