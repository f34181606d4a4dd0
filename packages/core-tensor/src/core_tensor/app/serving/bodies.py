"""Bodies of requests and responses: JSON and Arrow, nothing of which is trusted."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from core_tensor.app.extras import require

if TYPE_CHECKING:
    import pyarrow as pa
    from fastapi import Response

EXTRA = "core-tensor[serving]"
ARROW = "application/vnd.apache.arrow.stream"
"""Content type of an Arrow IPC stream."""


class RefusalError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def parse_json(body: bytes, schema: "pa.Schema | None", most: int) -> "tuple[pa.Table, dict[str, Any]]":
    """Rows and options of a JSON body."""
    pa, msgspec = require("pyarrow", EXTRA), require("msgspec", EXTRA)
    value = str | int | float | bool | None
    shape = msgspec.defstruct(
        "Body",
        [
            ("rows", list[dict[str, value | list[value]]]),
            ("options", dict[str, Any], msgspec.field(default_factory=dict)),
        ],
        forbid_unknown_fields=True,
    )
    try:
        found = msgspec.json.decode(body, type=shape)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"body: {error}") from error
    _check_count(len(found.rows), most)
    names = dict.fromkeys(name for row in found.rows for name in row)
    if schema is None:
        try:
            return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in found.rows]), found.options
        except pa.ArrowException as error:
            raise ValueError(f"rows: {error}") from error
    _check_names(names, schema)
    return pa.table([_column(found.rows, entry) for entry in schema], schema=schema), found.options


def _column(rows: list[dict[str, Any]], entry: "pa.Field") -> "pa.Array":
    """One column of JSON rows in the type of the schema."""
    pa = require("pyarrow", EXTRA)
    values = [row.get(entry.name) for row in rows]
    if pa.types.is_nested(entry.type) and any(isinstance(value, str) for value in values):
        raise ValueError(f"rows: column {entry.name}: expected lists, got text")  # whose characters Arrow would take
    lists = pa.types.is_list(entry.type)
    if pa.types.is_integer(entry.type.value_type if lists else entry.type):  # Arrow would cut fractions off
        flat = itertools.chain.from_iterable(value for value in values if isinstance(value, list)) if lists else values
        for value in flat:
            if isinstance(value, float) and not value.is_integer():
                raise ValueError(f"rows: column {entry.name}: expected integers, got {value!r}")
    try:
        return pa.array(values, entry.type)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"rows: column {entry.name}: {error}") from error


def parse_arrow(body: bytes, schema: "pa.Schema | None", most: int) -> "tuple[pa.Table, dict[str, Any]]":
    """Rows of an Arrow IPC stream; options are JSON in the metadata of its schema, under `options`."""
    pa = require("pyarrow", EXTRA)
    try:
        with require("pyarrow.ipc", EXTRA).open_stream(body) as reader:
            batches, count = [], 0
            for batch in reader:
                count += batch.num_rows
                _check_count(count, most)
                batches.append(batch)
            table = pa.Table.from_batches(batches, reader.schema)
        table.validate(full=True)  # offsets and indices of strangers
        raw = (table.schema.metadata or {}).get(b"options", b"{}")
        options = json.loads(raw)
        if not isinstance(options, dict):
            raise ValueError("options are no JSON object")
        if schema is None:
            return table, options
        if len(set(table.column_names)) != table.num_columns:
            raise ValueError("a column comes twice")
        _check_names(table.column_names, schema)
        columns = [
            table[entry.name].cast(entry.type) if entry.name in table.column_names else pa.nulls(count, entry.type)
            for entry in schema
        ]
        return pa.table(columns, schema=schema), options
    except RefusalError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError, EOFError) as error:
        raise ValueError(f"body: expected an Arrow IPC stream of rows ({error})") from error


def _check_count(count: int, most: int) -> None:
    """Refuse more rows than are allowed."""
    if count > most:
        raise RefusalError(413, f"rows: expected at most {most}, got {count}")


def _check_names(names: Sequence[str] | Mapping[str, Any], schema: "pa.Schema") -> None:
    """Refuse columns that the schema does not have, since a misspelled one would count as absent."""
    unknown = [name for name in names if name not in schema.names]
    if unknown:
        raise ValueError(f"rows: unknown column {', '.join(unknown[:5])}; expected {', '.join(schema.names)}")


def json_response(status: int, content: Mapping[str, Any]) -> "Response":
    """A JSON response; arrays become lists, what JSON cannot hold (NaN, infinities) null."""
    plain = {name: _lists(value) for name, value in content.items()}
    encoded = require("msgspec", EXTRA).json.encode(plain)
    answer: Response = require("fastapi", EXTRA).Response(encoded, status, media_type="application/json")
    return answer


def _lists(value: Any) -> Any:
    """Arrays of numpy, torch and Arrow as lists."""
    for method in ("tolist", "to_pylist"):
        if hasattr(value, method):
            return getattr(value, method)()
    return value


def arrow_response(columns: Mapping[str, Any]) -> "Response":
    """An Arrow response."""
    pa = require("pyarrow", EXTRA)
    table = pa.table(
        {name: pa.array(_lists(value)) if hasattr(value, "detach") else value for name, value in columns.items()}
    )
    sink = pa.BufferOutputStream()
    with require("pyarrow.ipc", EXTRA).new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    answer: Response = require("fastapi", EXTRA).Response(sink.getvalue().to_pybytes(), media_type=ARROW)
    return answer
