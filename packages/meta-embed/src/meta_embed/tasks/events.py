"""The event log in memory: rows sorted by entity and time, each entity a slice."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from core_tensor.app.files import is_partial, reading

from meta_embed.tasks import encode
from meta_embed.tasks.encode import Array, Vocabulary
from meta_embed.tasks.schema import Schema

Keys = np.ndarray[Any, Any]
"""Entity keys: int64, or an object array of strings."""


@dataclass(frozen=True)
class Events:
    """Events of M entities, N rows sorted by entity, time and event number; no event appears twice.

    Attributes:
        keys: Entity keys, shape (M,), int64 or strings, ascending.
        offsets: Slice of every entity, shape (M + 1,), int64.
        time: Seconds, shape (N,), float64.
        known: When each label was known, shape (N,), float64.
        event: Number of each event, shape (N,), uint64.
        y: Labels, shape (N,), float32.
        w: Weights, shape (N,), float32.
        ids: Categories of the rows, shape (N, k), int64.
        dense: Numbers of the rows, shape (N, p), float32.
        member_ids: Categories of the entities, shape (M, k'), int64.
        member_dense: Numbers of the entities, shape (M, p'), float32.
    """

    keys: Keys
    offsets: Array
    time: Array
    known: Array
    event: Array
    y: Array
    w: Array
    ids: Array
    dense: Array
    member_ids: Array
    member_dense: Array

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def counts(self) -> Array:
        """Events of every entity, shape (M,)."""
        return np.diff(self.offsets)

    def choose(self, members: Array) -> "Events":
        """The events of some entities.

        Args:
            members: Their positions, ascending.

        Returns:
            A smaller log.
        """
        counts = self.counts[members]
        rows = ranges(self.offsets[:-1][members], counts)
        by_row = {name: getattr(self, name)[rows] for name in ("time", "known", "event", "y", "w", "ids", "dense")}
        by_member = {name: getattr(self, name)[members] for name in ("keys", "member_ids", "member_dense")}
        return Events(offsets=np.concatenate([[0], counts.cumsum()]), **by_row, **by_member)

    def latest(self, most: int) -> "Events":
        """The last events of every entity.

        Args:
            most: How many at most.

        Returns:
            A smaller log of the same entities.
        """
        counts = np.minimum(self.counts, most)
        rows = ranges(self.offsets[1:] - counts, counts)
        by_row = {name: getattr(self, name)[rows] for name in ("time", "known", "event", "y", "w", "ids", "dense")}
        return replace(self, offsets=np.concatenate([[0], counts.cumsum()]), **by_row)


def ranges(starts: Array, counts: Array) -> Array:
    """Concatenation of start, start + 1, ..., start + count - 1 for every pair, int64."""
    total = int(counts.sum())
    shift = np.repeat(starts - np.concatenate([[0], counts.cumsum()[:-1]]), counts) if len(counts) else np.zeros(0)
    return (np.arange(total) + shift).astype(np.int64)


def parquet_files(path: str | Path) -> list[Path]:
    """The Parquet files of an event log, in order.

    Args:
        path: A file, or a folder with `*.parquet` files in it; as everywhere, names that begin with a dot or an
            underscore are not data.

    Returns:
        The files.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If the folder holds none.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(2, "No such file or folder", str(root))
    files = sorted(
        f
        for f in root.rglob("*.parquet")
        if not any(is_partial(p) for p in (f, *f.parents))
        and not any(name.startswith((".", "_")) for name in f.relative_to(root).parts)
    )
    if not files:
        raise ValueError(f"{root}: expected Parquet files in this folder, found none")
    return files


def check_columns(names: Iterable[str], schema: Schema, where: str) -> None:
    """Refuse a table without the columns that the schema names, or with two of one name.

    Args:
        names: Columns of the table.
        schema: What is needed.
        where: File or table, for the message.

    Raises:
        ValueError: If one is missing or there twice.
    """
    names = list(names)
    have = dict.fromkeys(names)
    twice = [name for name in schema.columns if names.count(name) > 1]
    if twice:
        raise ValueError(f"{where}: expected one column {', '.join(twice)}, got several")
    missing = [name for name in schema.columns if name not in have]
    if missing:
        raise ValueError(f"{where}: the schema names the missing column {', '.join(missing)}; it has {', '.join(have)}")


def stream_tables(path: str | Path, schema: Schema, batch_rows: int = 1 << 17) -> Iterator[pa.Table]:
    """Read an event log piece by piece.

    Args:
        path: A Parquet file or a folder of them; columns may be in the names of folders, `country=de`.
        schema: The columns to read.
        batch_rows: Rows of a piece at most.

    Yields:
        Tables with the schema's columns.

    Raises:
        ValueError: If a file is broken, lacks a column, or has other types than the first.
    """
    first: pa.Schema | None = None
    for file in parquet_files(path):
        for batch in _batches(file, schema, _columns_of_folders(file, Path(path)), batch_rows):
            table = pa.Table.from_batches([batch]).select(list(schema.columns))
            keys = encode.entity_keys(schema.entity, table[schema.entity])
            table = table.set_column(table.column_names.index(schema.entity), schema.entity, keys)
            first = first or table.schema
            yield _as_before(table, first, file)


def _columns_of_folders(file: Path, root: Path) -> dict[str, pa.Scalar]:
    """Columns that partitioned data sets keep in the names of folders, as text whatever other folders are called."""
    parts = (part.partition("=") for part in file.relative_to(root).parts[:-1])
    absent = "__HIVE_DEFAULT_PARTITION__"
    return {
        name: pa.scalar(None if value == absent else unquote(value), pa.string())
        for name, equals, value in parts
        if name and equals
    }


def _batches(file: Path, schema: Schema, folders: Mapping[str, pa.Scalar], rows: int) -> Iterator[pa.RecordBatch]:
    with reading(file, "a Parquet file of events"):
        source = pq.ParquetFile(file)
        own = source.schema_arrow.names
        outside = {name: value for name, value in folders.items() if name in schema.columns and name not in own}
        check_columns([*own, *outside], schema, str(file))
        for batch in source.iter_batches(rows, columns=[name for name in schema.columns if name not in outside]):
            for name, value in outside.items():
                batch = batch.append_column(name, pa.repeat(value, batch.num_rows))
            yield batch


def _as_before(table: pa.Table, kinds: pa.Schema, file: Path) -> pa.Table:
    """A table with the column types of the first file: tools differ in widths and units, which are no error."""
    columns = []
    for field, column in zip(kinds, table.columns, strict=True):
        if column.type != field.type:
            message = f"{file}: {field.name}: expected {field.type} as in the other files, got {column.type}"
            if _is_text(field.type) != _is_text(column.type):  # 7 and "7" are different members
                raise ValueError(message)
            try:
                column = column.cast(field.type, safe=not pa.types.is_timestamp(field.type))
            except pa.ArrowException as error:
                raise ValueError(message) from error
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=kinds)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def read_table(path: str | Path, schema: Schema) -> pa.Table:
    """Read a complete event log.

    Args:
        path: A Parquet file or a folder of them.
        schema: The columns to read.

    Returns:
        One table.

    Raises:
        ValueError: If it has no row.
    """
    tables = list(stream_tables(path, schema))
    if not sum(t.num_rows for t in tables):
        raise ValueError(f"{path}: expected events, found no row")
    return pa.concat_tables(tables, promote_options="permissive")


def build_events(table: pa.Table, schema: Schema, vocabulary: Vocabulary) -> Events:
    """Encode, sort and slice a table; an event that was delivered twice counts once.

    Args:
        table: Events in any order, with the schema's columns.
        schema: What the columns mean.
        vocabulary: Of the categories, from `encode.build_vocabulary`.

    Returns:
        The log.

    Raises:
        ValueError: If a column is missing or a value is out of range.
        TypeError: If entity keys are neither integers nor strings.
    """
    check_columns(table.column_names, schema, "events")
    keys = encode.entity_keys(schema.entity, table[schema.entity])
    encoded = keys.dictionary_encode()
    values = _as_numpy(encoded.dictionary)
    order = np.argsort(values, kind="stable")
    code = np.empty(len(values), np.int64)
    code[order] = np.arange(len(values))
    entity = code[encoded.indices.to_numpy(zero_copy_only=False)]
    time = encode.encode_time(schema.time, table[schema.time])
    known = encode.encode_time(schema.known, table[schema.known]) if schema.known else time
    if (known < time).any():
        raise ValueError(f"{schema.known}: expected labels known at or after their event, got one before it")
    event = encode.event_numbers(table, schema)
    sorting = np.lexsort((event, time, entity))
    entity, event = entity[sorting], event[sorting]
    again = _repeated(entity, event)
    sorting, entity = sorting[~again], entity[~again]
    counts = np.bincount(entity, minlength=len(values))
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    firsts = sorting[offsets[:-1]]
    members = table.select([f.name for f in schema.member]) if schema.member else None
    member_ids, member_dense = np.zeros((len(values), 0), np.int64), np.zeros((len(values), 0), np.float32)
    if members is not None:
        ids, dense = encode.encode_ids(members, schema.member, vocabulary), encode.encode_dense(members, schema.member)
        member_ids, member_dense = ids[firsts], dense[firsts]
        if (ids[sorting] != member_ids[entity]).any() or (dense[sorting] != member_dense[entity]).any():
            warnings.warn(
                "features of a member change between its events: those of its first event count", stacklevel=2
            )
    ones = np.ones(table.num_rows, np.float32)
    weight = encode.encode_weight(schema.weight, table[schema.weight]) if schema.weight else ones
    return Events(
        keys=values[order],
        offsets=offsets,
        time=time[sorting],
        known=known[sorting],
        event=event[~again],
        y=encode.encode_label(schema.label, table[schema.label])[sorting],
        w=weight[sorting],
        ids=encode.encode_ids(table, schema.row, vocabulary)[sorting],
        dense=encode.encode_dense(table, schema.dense_row)[sorting],
        member_ids=member_ids,
        member_dense=member_dense,
    )


def _repeated(entity: Array, event: Array) -> Array:
    """Which rows, sorted by entity and time, repeat an event of the same entity."""
    order = np.lexsort((np.arange(len(event)), event, entity))
    same = (entity[order][1:] == entity[order][:-1]) & (event[order][1:] == event[order][:-1])
    again = np.zeros(len(event), bool)
    again[order[1:]] = same
    return again


def _as_numpy(keys: pa.Array) -> Keys:
    """Distinct keys as int64 or as an object array of strings."""
    if pa.types.is_string(keys.type):
        return np.asarray(keys.to_pylist(), dtype=object)
    return np.asarray(keys.to_numpy(zero_copy_only=False), np.int64)


def concatenate(parts: Sequence[Events]) -> Events:
    """Logs of different entities, one after the other; keys must ascend."""
    counts = np.concatenate([p.counts for p in parts])
    joined = {
        name: np.concatenate([getattr(p, name) for p in parts])
        for name in Events.__dataclass_fields__
        if name != "offsets"
    }
    return Events(offsets=np.concatenate([[0], counts.cumsum()]).astype(np.int64), **joined)
