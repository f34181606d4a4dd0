"""Scoring a whole file of candidates by a policy."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from core_tensor.app.files import atomic_path

from polytope_lp.matching.solution import policy_keys
from polytope_lp.serving.policy import Policy
from polytope_lp.tables.columns import Columns, names_of
from polytope_lp.tables.files import read_table
from polytope_lp.tables.keys import Sources, numbers, plain_keys, require


def score_file(policy: Policy, edges: str | Path, names: Columns, out: str | Path) -> dict[str, Any]:
    """Allocate every source of a file, and write the amounts above zero.

    Args:
        policy: The policy.
        edges: Parquet file of candidates: source, destination, value, and cost if the problem had costs.
        names: Names of the columns.
        out: Parquet file to write, with columns source, destination, x.

    Returns:
        Sources, candidates, sum of amounts and value.

    Raises:
        ValueError: If a column is missing or does not fit, or the policy needs caps, bounds or weights by source.
    """
    if policy.needs:
        raise ValueError(f"policy: needs {', '.join(policy.needs)} by source or edge; use Policy.score")
    table = read_table(Path(edges), names).combine_chunks()
    if table.num_rows == 0:
        raise ValueError("edges: expected at least one edge, got none")
    rows, costs = names_of(names.destination), names_of(names.cost)
    runs = Sources()
    for chunk in require(table.schema, table, "edges", names.source).chunks:
        runs.add(chunk)
    offsets, _, order = runs.finish()
    values = numbers("edges.value", require(table.schema, table, "edges", names.value), np.float64)
    found = [policy.rows(_keys(name, require(table.schema, table, "edges", name))) for name in rows]
    there = [name if names.optional(name, table.schema, "edges") else None for name in costs]
    ones = np.ones(table.num_rows)
    cost = [ones if name is None else numbers(f"edges.{name}", table.column(name), np.float64) for name in there]
    a = cost[0] if len(cost) == 1 else np.stack(cost, axis=1)
    row = found[0] if len(found) == 1 else np.stack(found, axis=1)
    order = np.arange(table.num_rows) if order is None else order
    x = policy.score_sources(offsets, values[order], a[order], row[order])
    kept = np.flatnonzero(x > 0)
    columns = {
        name: plain_keys(f"edges.{key}", table.column(key)).take(pa.array(order[kept]))
        for name, key in _output(names).items()
    }
    with atomic_path(out) as temporary:
        pq.write_table(pa.table({**columns, "x": x[kept]}), temporary)
    return {
        "out": str(out),
        "sources": offsets.size - 1,
        "candidates": table.num_rows,
        "allocated": float(x.sum()),
        "value": float(x @ values[order]),
    }


def _output(names: Columns) -> dict[str, str]:
    return {"source": names.source, "destination": names_of(names.destination)[0]}


def _keys(name: str, column: Any) -> Any:
    keys = plain_keys(f"edges.{name}", column)
    return policy_keys(keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys)
