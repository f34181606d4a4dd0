"""Keys and numbers of tables: every type that a warehouse writes is cast here, once, to the few that the rest knows."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from polytope_lp.tables.columns import Columns, names_of

KINDS = "integers, strings, UUIDs, dates or timestamps"


def plain_keys(name: str, column: Any) -> Any:
    """A column of keys in the one type used for its kind.

    Integers of any width and decimals without places become int64, every kind of text `large_string`, timestamps UTC
    microseconds; dictionaries (categoricals, enums) are decoded, and extension types (UUID) are their storage.

    Args:
        name: What the column is called in an error.
        column: An Arrow array, or chunks of one.

    Returns:
        The same keys.

    Raises:
        ValueError: If a key is missing, or of a type that cannot be one.
    """
    if isinstance(column, pa.ChunkedArray):
        chunks = [plain_keys(name, chunk) for chunk in column.chunks]
        return pa.chunked_array(chunks) if chunks else plain_keys(name, pa.array([], column.type))
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain_keys(name, column.storage)
    if pa.types.is_dictionary(kind):
        values, target = column.dictionary, _target(kind.value_type)
        if target is not None and values.type != target:
            values = values.cast(target)
        decoded = pa.DictionaryArray.from_arrays(column.indices, values).dictionary_decode()
        return plain_keys(name, decoded)  # a missing value of the dictionary is a null now
    if column.null_count:
        raise ValueError(f"{name}: expected keys, got {column.null_count} nulls")
    target = _target(kind)
    if target is None:
        raise ValueError(f"{name}: expected {KINDS}, got {kind}")
    try:
        return column if kind == target else column.cast(target)
    except pa.ArrowException as error:
        raise ValueError(f"{name}: a key of type {kind} does not fit {target} ({error})") from error


def _target(kind: Any) -> Any:
    text = (pa.types.is_string, pa.types.is_large_string, getattr(pa.types, "is_string_view", lambda _: False))
    if pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0):
        return pa.int64()
    if any(test(kind) for test in text):
        return pa.large_string()
    if pa.types.is_fixed_size_binary(kind):
        return kind
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.large_binary()
    if pa.types.is_date(kind):
        return pa.date32()
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", tz="UTC" if kind.tz else None)
    return None


def numbers(name: str, column: Any, dtype: Any) -> NDArray[Any]:
    """A column of finite numbers.

    Args:
        name: What it is called in an error.
        column: The column.
        dtype: Dtype to convert to.

    Returns:
        The numbers.

    Raises:
        ValueError: If there is something else, a null, NaN or an infinity.
    """
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise ValueError(f"{name}: expected a column of numbers, got {kind}")
    if column.null_count:
        raise ValueError(f"{name}: expected numbers, got {column.null_count} nulls")
    if pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    values = np.asarray(column, dtype=dtype)
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name}: expected finite values, got {values[at]} in row {at}")
    return values


def require(schema: pa.Schema, holder: Any, table: str, name: str) -> Any:
    """A column that must be there, once.

    Args:
        schema: Columns of the table.
        holder: The table.
        table: What it is called in an error.
        name: The column.

    Returns:
        The column.

    Raises:
        ValueError: If it is absent, or there are several of that name.
    """
    found = schema.names.count(name)
    if found != 1:
        raise ValueError(f"{table}: expected {'one' if found else 'a'} column {name!r}, got {', '.join(schema.names)}")
    return holder.column(name)


def key_column(table: pa.Table, title: str, name: str) -> pa.Array:
    """A column of distinct keys.

    Args:
        table: The table.
        title: What it is called in an error.
        name: The column.

    Returns:
        One array, in the type of `plain_keys`.

    Raises:
        ValueError: If the column is absent, a key is missing, or one appears twice.
    """
    column = plain_keys(f"{title}.{name}", require(table.schema, table, title, name))
    keys = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if len(pc.unique(keys)) != len(keys):
        raise ValueError(f"{title}.{name}: expected each {'destination' if title == 'budgets' else 'source'} once")
    return keys


def places(name: str, column: Any, keys: pa.Array, missing: str) -> NDArray[np.int64]:
    """Positions of keys among known ones of the same kind.

    Args:
        name: What the column is called in an error.
        column: Keys in the type of `plain_keys`.
        keys: Known keys, distinct, in the type of `plain_keys`.
        missing: What is wrong with a key that is not known, after its name.

    Returns:
        Positions in `keys`, shape (column,), int64.

    Raises:
        ValueError: If the kinds differ (text is never read as a number), or a key is not known.
    """
    if column.type != keys.type:
        raise ValueError(f"{name}: {column.type} keys do not fit the {keys.type} keys of the other table")
    found = pc.index_in(column, keys)
    if found.null_count:
        unknown = column.filter(pc.is_null(found))[0].as_py()
        raise ValueError(f"{name}: {unknown!r} {missing}")
    return np.asarray(found, dtype=np.int64)


class Keys:
    """Rows for the keys of the destinations.

    Args:
        table: Budgets.
        names: Names of the columns.
    """

    def __init__(self, table: pa.Table, names: Columns) -> None:
        self.keys = key_column(table, "budgets", names_of(names.destination)[0])
        integers = pa.types.is_integer(self.keys.type)
        self.plain = integers and np.array_equal(np.asarray(self.keys), np.arange(len(self.keys)))

    def rows(self, column: pa.Array) -> NDArray[np.int32]:
        """Row of every key.

        Args:
            column: Keys of the edges.

        Returns:
            Rows, shape (edges,), int32.

        Raises:
            ValueError: If a key is missing or has no budget.
        """
        column = plain_keys("edges.destination", column)
        if self.plain and pa.types.is_integer(column.type):
            numbers = np.asarray(column)
            bad = (numbers < 0) | (numbers >= len(self.keys))
            if bad.any():
                raise ValueError(f"edges.destination: {numbers[bad][0]} has no budget")
            return numbers.astype(np.int32)
        return places("edges.destination", column, self.keys, "has no budget").astype(np.int32)


class Sources:
    """Runs of equal source keys, in the order of the rows."""

    def __init__(self) -> None:
        self.starts: list[NDArray[np.int64]] = []
        self.keys: list[Any] = []
        self.seen, self.rising = 0, True
        self.last: Any = None

    def add(self, column: Any) -> None:
        """Take the next rows.

        Args:
            column: Keys of the sources.

        Raises:
            ValueError: If a key is missing, or of a type that cannot be one, or that of earlier rows.
        """
        column = plain_keys("edges.source", column)
        if self.keys and self.keys[-1].type != column.type:
            raise ValueError(f"edges.source: expected {self.keys[-1].type} keys as before, got {column.type}")
        if pa.types.is_integer(column.type):
            numbers = np.asarray(column)
            change = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
            self.rising &= bool((numbers[1:] >= numbers[:-1]).all())
            self.rising &= self.last is None or bool(numbers[0] >= self.last)
            first = self.last is None or numbers[0] != self.last
            self.last = numbers[-1]
        else:
            change = np.flatnonzero(np.asarray(pc.not_equal(column[1:], column[:-1]))) + 1
            first = self.last is None or column[0].as_py() != self.last
            self.last = column[-1].as_py()
        at = np.concatenate([[0], change]) if first else change
        self.starts.append(at + self.seen)
        self.keys.append(column.take(pa.array(at)))
        self.seen += len(column)

    def finish(self) -> tuple[NDArray[np.int64], Any, NDArray[np.int64] | None]:
        """Bring equal sources together.

        Returns:
            Offsets of the sources' edges, their keys, and the order of the rows (None if they are together).
        """
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


def value_dtype(types: list[Any]) -> type[np.float32] | type[np.float64]:
    """Dtype in which the numbers of a problem are held.

    Args:
        types: Arrow types of the values, one per file.

    Returns:
        float32 where all of them are, else float64.
    """
    return np.float32 if all(pa.types.is_float32(kind) for kind in types) else np.float64
