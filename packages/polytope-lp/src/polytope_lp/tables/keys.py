"""Keys and numbers of tables: from what the user calls things to rows, blocks and arrays."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from polytope_lp.tables.columns import Columns, names_of


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
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(f"{name}: expected a column of numbers, got {kind}")
    if column.null_count:
        raise ValueError(f"{name}: expected numbers, got {column.null_count} nulls")
    values = np.asarray(column, dtype=dtype)
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name}: expected finite values, got {values[at]} in row {at}")
    return values


def require(schema: pa.Schema, holder: Any, table: str, name: str) -> Any:
    """A column that must be there.

    Args:
        schema: Columns of the table.
        holder: The table.
        table: What it is called in an error.
        name: The column.

    Returns:
        The column.

    Raises:
        ValueError: If it is absent.
    """
    if schema.get_field_index(name) < 0:
        raise ValueError(f"{table}: expected a column {name!r}, got {', '.join(schema.names)}")
    return holder.column(name)


def key_column(table: pa.Table, title: str, name: str) -> pa.Array:
    """A column of distinct keys.

    Args:
        table: The table.
        title: What it is called in an error.
        name: The column.

    Returns:
        One array, without a dictionary.

    Raises:
        ValueError: If the column is absent, a key missing, or one stands twice.
    """
    column = require(table.schema, table, title, name)
    keys = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(keys.type):
        keys = keys.cast(keys.type.value_type)
    if keys.null_count:
        raise ValueError(f"{title}.{name}: expected keys, got {keys.null_count} nulls")
    if len(pc.unique(keys)) != len(keys):
        raise ValueError(f"{title}.{name}: expected each {'destination' if title == 'budgets' else 'source'} once")
    return keys


class Keys:
    """Rows for the keys of the destinations.

    Args:
        table: Budgets.
        names: Names of the columns.
    """

    def __init__(self, table: pa.Table, names: Columns) -> None:
        self.keys = key_column(table, "budgets", names_of(names.destination)[0])
        whole = pa.types.is_integer(self.keys.type)
        self.plain = whole and np.array_equal(np.asarray(self.keys), np.arange(len(self.keys)))

    def rows(self, column: pa.Array) -> NDArray[np.int32]:
        """Row of every key.

        Args:
            column: Keys of the edges.

        Returns:
            Rows, shape (edges,), int32.

        Raises:
            ValueError: If a key is missing or has no budget.
        """
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
            ValueError: If a key is missing, or neither an integer nor a string.
        """
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
