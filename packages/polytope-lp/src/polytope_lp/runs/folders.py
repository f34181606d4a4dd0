"""The folders of the command line: generated problems, and solutions with their certificate and input."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from core_tensor.app.files import atomic_path, read_json, reading, sweep, write_json
from numpy.typing import NDArray

from polytope_lp.matching.generate import Budgets, EdgeBatch, Marketplace, edge_batches
from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.matching.solution import Solution, policy_keys, row_columns
from polytope_lp.matching.verify import SLACK, check_claims
from polytope_lp.runs.models import verify_model
from polytope_lp.serving.policy import Policy
from polytope_lp.tables.columns import columns_of
from polytope_lp.tables.files import read_table
from polytope_lp.tables.keys import numbers as amounts
from polytope_lp.tables.keys import places, plain_keys, require
from polytope_lp.tables.packed import changed_files, is_packed
from polytope_lp.tables.tables import input_hashes, polytope_of, read_problem

BATCHES_PER_FILE = 64
HISTORY = pa.schema(
    [
        *(pa.field(name, pa.int64(), nullable=False) for name in ("evaluation",)),
        *(pa.field(name, pa.float64(), nullable=False) for name in ("seconds", "gamma")),
        pa.field("proximal", pa.bool_(), nullable=False),
        pa.field("lower", pa.float64(), nullable=False),
        *(pa.field(name, pa.float64()) for name in ("upper", "gap")),
        *(pa.field(name, pa.float64(), nullable=False) for name in ("violation", "smoothing", "fractional")),
    ]
)
EDGES = pa.schema(
    [("source", pa.int64()), ("destination", pa.int32()), ("value", pa.float32()), ("cost", pa.float32())]
)


def write_marketplace(market: Marketplace, folder: str | Path, progress: Any = iter, *, resume: bool = False) -> int:
    """Generate a problem folder as a stream: `edges/*.parquet`, `budgets.parquet`, `problem.json`.

    Args:
        market: What to generate.
        folder: Where; created if it is not there, and refused if it holds a problem.
        progress: Wraps the iterator of batches.
        resume: Whether edges that lie there are of this marketplace, from a run that was stopped.

    Returns:
        Number of edges.

    Raises:
        ValueError: If the folder already holds edges, or the kind has several rows per edge.
    """
    root = Path(folder)
    sweep(root / "edges")
    if not resume and any((root / "edges").glob("*.parquet")):
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
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, EDGES, compression="none", use_dictionary=False, write_statistics=False) as file,
    ):
        yield lambda batch: file.write_batch(
            pa.record_batch([batch.source, batch.destination, batch.value, batch.cost], schema=EDGES)
        )


@dataclass(frozen=True)
class Source:
    """What a solution was made from.

    Attributes:
        path: The problem's folder or edge file.
        budgets: The problem's budget file, or None.
        sources: The problem's file of sources, or None.
        read: How the problem was read: `polytope`, `columns` and `allow_unused`.
        sha256: Digest of every input file, by path.
    """

    path: str
    budgets: str | None
    sources: str | None
    read: dict[str, Any]
    sha256: dict[str, str]

    @classmethod
    def of(
        cls, path: Path, budgets: Path | None = None, sources: Path | None = None, read: dict[str, Any] | None = None
    ) -> "Source":
        """Read the digests of the input's files.

        Args:
            path: As in `read_problem`.
            budgets: As in `read_problem`.
            sources: As in `read_problem`.
            read: How the problem is read.

        Returns:
            The source, with absolute paths.
        """
        known = {"polytope": None, "columns": None, "allow_unused": False} | (read or {})
        files = [None if file is None else str(file.resolve()) for file in (path, budgets, sources)]
        return cls(str(files[0]), files[1], files[2], known, input_hashes(str(files[0]), files[1], files[2]))

    @classmethod
    def load(cls, file: Path) -> "Source":
        """Read an `input.json`.

        Args:
            file: The file.

        Returns:
            The source.

        Raises:
            ValueError: If the file is not one.
        """
        with reading(file, "the input of a solution"):
            source = cls(**read_json(file))
            texts = (source.path, source.budgets or "", source.sources or "", *source.sha256, *source.sha256.values())
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("a path or digest is not text")
            polytope, columns = source.read["polytope"], source.read["columns"]
            if not isinstance(polytope, dict | None) or not isinstance(columns, dict | None):
                raise ValueError("polytope or columns of another type")
            if not isinstance(source.read["allow_unused"], bool):
                raise ValueError("allow_unused of another type")
            return source

    def problem(self) -> MatchingProblem:
        """Read the problem.

        Returns:
            The problem.
        """
        polytope, columns = self.read["polytope"], self.read["columns"]
        return read_problem(
            self.path,
            self.budgets,
            None if polytope is None else polytope_of(polytope),
            columns_of(columns) if columns else None,
            sources=self.sources,
            allow_unused=self.read["allow_unused"],
        )

    def changed(self) -> bool:
        """Whether a file is not what it was.

        Returns:
            True where a digest differs.
        """
        now = input_hashes(self.path, self.budgets, self.sources)
        return sorted(now.values()) != sorted(self.sha256.values()) or bool(
            is_packed(self.path) and changed_files(self.path)
        )


def write_solution(solution: Solution, out: str | Path, source: Source) -> None:
    """Write a solution: primal (Arrow stream), prices, certificate, history, policy, and what it was made from.

    Args:
        solution: The solution.
        out: Folder to write to.
        source: The problem's files.
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
    for name, table in (("prices", solution.prices()), ("history", pa.Table.from_pylist(solution.history, HISTORY))):
        with atomic_path(root / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary)
    Policy.from_solution(solution).save(root / "policy.npz")
    write_json(root / "input.json", asdict(source))
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
    with reading(root / "input.json", "the input of a solution"):
        if "model" in read_json(root / "input.json"):
            return verify_model(root)
    source, claims = Source.load(root / "input.json"), read_json(root / "certificate.json")
    if not isinstance(claims, dict):
        raise ValueError(f"{root / 'certificate.json'}: expected an object, got {type(claims).__name__}")
    problem, prices, history = source.problem(), read_prices(root), read_history(root)
    with reading(root / "primal.arrow", "the primal of a solution"):
        with pa.OSFile(str(root / "primal.arrow"), "rb") as file:
            primal = pa.ipc.open_stream(file).read_all()
        primal.validate(full=True)
    lam = np.asarray(prices.column("price"), dtype=np.float64)
    if lam.shape[0] != problem.rows:
        raise ValueError(f"{root}: prices of {lam.shape[0]} rows, but the problem has {problem.rows}")
    x = dense_primal(problem, primal)
    result = check_claims(problem, x, problem.row_sign.numpy() * lam, claims)
    result["problems"] += check_reports(problem, x, prices, history, claims)
    result["problems"] += check_policy(problem, Policy.load(root / "policy.npz"))
    result["input_unchanged"] = not source.changed()
    if not result["input_unchanged"]:
        result["problems"].append("the input's files have changed since it was solved")
    result["ok"] = not result["problems"]
    return result


def check_reports(
    problem: MatchingProblem, x: NDArray[np.float64], prices: pa.Table, history: pa.Table, claims: dict[str, Any]
) -> list[str]:
    """What the table of prices and the history say that the problem and the certificate do not.

    Args:
        problem: The problem.
        x: The primal, shape (variables,), float64.
        prices: `prices.parquet`.
        history: `history.parquet`.
        claims: The certificate.

    Returns:
        One line for every statement that does not hold.
    """
    sign = problem.row_sign.numpy()
    lines, d, b = [], problem.data, sign * problem.budgets.numpy()
    rows = d.index.numpy().reshape(d.variables, -1)
    a = np.ones(rows.shape) if d.coefficient is None else d.coefficient.double().numpy().reshape(rows.shape)
    load = sign * np.bincount(rows.ravel(), (a * x[:, None]).ravel(), problem.rows)
    size = np.bincount(rows.ravel(), (np.abs(a) * x[:, None]).ravel(), problem.rows)
    if not np.array_equal(prices.column("budget"), b):
        lines.append("prices: the budgets are not those of the problem")
    if not (np.abs(np.asarray(prices.column("load")) - load) <= SLACK * size).all():
        lines.append("prices: the loads are not those of the primal")
    if "used" in prices.column_names:
        used = np.asarray(prices.column("used"), dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            truth = np.where(b != 0, load / b, np.nan)
        if not np.allclose(used, truth, rtol=1e-6, atol=1e-9, equal_nan=True):
            lines.append("prices: the shares used are not load / budget")
    for name, column in row_columns(problem).items():
        if name not in prices.column_names or not prices.column(name).combine_chunks().equals(column):
            lines.append(f"prices: {name} is not as in the problem")
    lower = np.asarray(history.column("lower"), dtype=np.float64)
    counted = np.array_equal(history.column("evaluation"), np.arange(1, history.num_rows + 1))
    if history.num_rows != claims.get("evaluations") or not counted:
        lines.append(f"history: {history.num_rows} evaluations, not {claims.get('evaluations')}")
    elif not (np.diff(lower) >= 0).all() or lower[-1] != claims.get("lower_bound"):
        lines.append("history: its last lower bound is not the one claimed")
    elif history.column("seconds")[-1].as_py() != claims.get("seconds"):
        lines.append("history: its seconds are not those claimed")
    return lines


def check_policy(problem: MatchingProblem, policy: Policy) -> list[str]:
    """What a policy says that the problem does not.

    Args:
        problem: The problem.
        policy: The policy.

    Returns:
        One line for every statement that does not hold.
    """
    lines, d = [], problem.data
    if policy.lam.size != problem.rows or policy.resources != max(1, len(problem.resources)):
        return [f"policy: {policy.lam.size} prices of {policy.resources} budgets, the problem has {problem.rows} rows"]
    if ((problem.row_sign.numpy() * policy.lam)[~problem.equality.numpy()] < 0).any():
        lines.append("policy: a price of an inequality is negative")
    keys = None if problem.destination_keys is None else policy_keys(problem.destination_keys)
    same = keys is policy.keys if keys is None or policy.keys is None else np.array_equal(keys, policy.keys)
    if not same:
        lines.append("policy: the destinations are not those of the problem")
    if policy.equality != d.equality or ("cap" not in policy.needs and bool((d.cap != policy.cap).any())):
        lines.append("policy: the polytope is not that of the problem")
    return lines


def read_history(out: str | Path) -> pa.Table:
    """The history of a solution folder, checked.

    Args:
        out: Folder that `write_solution` wrote.

    Returns:
        One row per evaluation.

    Raises:
        ValueError: If the file is missing or unreadable, or is not a history.
    """
    file = Path(out) / "history.parquet"
    table = read_table(file)
    with reading(file, "the history of a solution"):
        table = table.select(HISTORY.names).cast(HISTORY)
        missing = [f.name for f in HISTORY if not f.nullable and table.column(f.name).null_count]
        if missing or not table.num_rows:
            raise ValueError(f"nulls in {missing[0]}" if missing else "no evaluation")
    return table


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
        column = require(prices.schema, prices, str(file), name)
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

    def numbers(name: str, keys: Any) -> NDArray[np.int64]:
        column = plain_keys(f"primal.{name}", require(primal.schema, primal, "primal", name))
        if keys is None:
            keys = pa.array(np.zeros(0, dtype=np.int64))
            if column.type != keys.type:
                raise ValueError(f"primal.{name}: expected int64 keys, got {column.type}")
            return np.asarray(column, dtype=np.int64)
        return places(f"primal.{name}", column, keys, "is not in the problem")

    block = numbers("source", problem.source_keys)
    row = numbers("destination", problem.destination_keys)
    offsets = problem.data.offsets.numpy()
    rows = problem.data.index.reshape(problem.data.variables, -1)[:, 0].numpy()
    x = np.zeros(problem.data.variables)
    if block.size and not (0 <= block.min() <= block.max() < problem.data.blocks and row.min() >= 0):
        raise ValueError("primal: names a source or destination that the problem does not have")
    values = amounts("primal.x", require(primal.schema, primal, "primal", "x"), np.float64)
    first = 0
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
