"""Arrow columns as this package reads them: one form for each kind, whatever tool wrote the file.

Spark, polars, DuckDB and pandas write the same column as dictionaries, large or view strings, decimals, lists of
several kinds, nanosecond or microsecond timestamps. Each becomes one canonical form here, or an error names the column.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def column_of(table: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    """A column of a table as one array."""
    if table.schema.names.count(name) != 1:
        raise ValueError(f"column {name!r}: expected once among {', '.join(table.schema.names)}")
    found = table.column(name)
    if isinstance(found, pa.ChunkedArray):
        if pa.types.is_dictionary(found.type):
            found = found.unify_dictionaries()
        found = pa.concat_arrays(found.chunks) if found.num_chunks else pa.array([], found.type)
    return found


def decoded(array: pa.Array) -> pa.Array:
    """A column of scalars without dictionary, strings as `large_string`, decimals without a fraction as integers."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return decoded(array.dictionary_decode())
    if pa.types.is_run_end_encoded(kind):
        return decoded(pc.run_end_decode(array))
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return array.cast(pa.large_string())
    if pa.types.is_decimal(kind) and kind.scale <= 0:
        return array.cast(pa.int64())
    return array


def as_float(name: str, array: pa.Array) -> np.ndarray:
    """A numeric column as float64, shape (n,), NaN where null; integers above 2**53 lose digits as in any model."""
    array = decoded(array)
    kind = array.type
    if not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    ):
        raise ValueError(f"column {name!r}: expected numbers, got {kind}")
    values = array.cast(pa.float64(), safe=False) if not pa.types.is_boolean(kind) else array.cast(pa.int8())
    return np.array(values.to_numpy(zero_copy_only=False), dtype=np.float64)


def as_times(name: str, array: pa.Array) -> np.ndarray:
    """Event times as int64 in the column's own unit, shape (n,); nulls are refused."""
    array = decoded(array)
    kind = array.type
    if array.null_count:
        row = int(np.argmax(np.asarray(array.is_null())))
        raise ValueError(f"column {name!r}: expected a time in every row, row {row} is null")
    if pa.types.is_date(kind):
        array = array.cast(pa.timestamp("s"))
    elif not (pa.types.is_timestamp(kind) or pa.types.is_integer(kind)):
        raise ValueError(f"column {name!r}: expected integers or timestamps, got {kind}")
    if pa.types.is_uint64(kind):
        array = array.cast(pa.int64())  # a checked cast: refuses what does not fit
    return np.array(array.cast(pa.int64()), dtype=np.int64)


def seconds_per_unit(kind: pa.DataType, unit: str) -> float:
    """Seconds in one unit of a time column: of a timestamp its own, of integers what the schema says."""
    if pa.types.is_timestamp(kind):
        return _UNITS[kind.unit]
    return 1.0 if pa.types.is_date(kind) else _UNITS[unit]


def as_lists(name: str, array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """A list column as its values and offsets, shape (n + 1,), int64, from 0; a null list is an empty one."""
    kind = array.type
    others = (pa.types.is_list, pa.types.is_list_view, pa.types.is_large_list_view, pa.types.is_fixed_size_list)
    if any(is_kind(kind) for is_kind in others):
        array = array.cast(pa.large_list(kind.value_type))
    elif not pa.types.is_large_list(kind):
        raise ValueError(f"column {name!r}: expected lists, got {kind}")
    if array.null_count:
        lengths = np.asarray(pc.fill_null(pc.list_value_length(array), 0)).astype(np.int64)
        return array.flatten(), np.concatenate([[0], lengths.cumsum()])
    offsets = np.asarray(array.offsets).astype(np.int64)
    return array.values.slice(offsets[0], offsets[-1] - offsets[0]), offsets - offsets[0]
