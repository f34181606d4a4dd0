"""From columns to numbers: vocabularies, hashed categories, dense columns, entity keys, event numbers."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meta_embed.tasks.schema import Feature, Schema

Array = np.ndarray[Any, Any]
Vocabulary = Mapping[str, Sequence[Any]]
"""Column name to its values; the value at position i has row i + 1 of its table, row 0 is all others."""


def build_vocabulary(table: pa.Table, schema: Schema) -> dict[str, list[Any]]:
    """The distinct values of every category that is not hashed, in order.

    Args:
        table: Training events.
        schema: Their columns.

    Returns:
        Values by column.
    """
    found = {}
    for feature in (*schema.row, *schema.member):
        if feature.kind == "id" and feature.buckets == 0:
            values = pc.unique(table[feature.name]).to_pylist()
            found[feature.name] = sorted((v for v in values if v is not None), key=lambda v: (isinstance(v, str), v))
    return found


def rows_of_table(feature: Feature, vocabulary: Vocabulary) -> int:
    """How many rows the embedding table of a category needs."""
    return feature.buckets or len(vocabulary[feature.name]) + 1


def encode_ids(table: pa.Table, features: Sequence[Feature], vocabulary: Vocabulary) -> Array:
    """Table rows of the categories, shape (N, number of `id` features), int64."""
    chosen = [f for f in features if f.kind == "id"]
    out = np.zeros((table.num_rows, len(chosen)), np.int64)
    for j, feature in enumerate(chosen):
        encoded = table[feature.name].combine_chunks().dictionary_encode()
        values = encoded.dictionary.to_pylist()
        if feature.buckets:
            rows = [_hash(str(value)) % feature.buckets for value in values]  # 7 and "7" are one category
        else:
            index = {value: i + 1 for i, value in enumerate(vocabulary[feature.name])}
            rows = [index.get(value, 0) for value in values]
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        if len(rows):
            out[:, j] = np.where(codes >= 0, np.asarray(rows, np.int64)[codes], 0)
    return out


def _hash(value: Any) -> int:
    """A number of a category that no machine and no run changes."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little")


def encode_dense(table: pa.Table, features: Sequence[Feature]) -> Array:
    """Numbers of the dense columns, shape (N, sum of their widths), float32; they must be finite."""
    chosen = [f for f in features if f.kind == "dense"]
    out = np.zeros((table.num_rows, sum(f.width for f in chosen)), np.float32)
    start = 0
    for feature in chosen:
        column = table[feature.name].combine_chunks()
        part = out[:, start : start + feature.width]
        part[:] = _lists(feature, column) if _is_list(column.type) else _numbers(feature.name, column)[:, None]
        if feature.width > 1 and not _is_list(column.type):
            raise ValueError(f"{feature.name}: expected lists of {feature.width} numbers, got {column.type}")
        if not np.isfinite(part).all():
            raise ValueError(f"{feature.name}: expected finite numbers, got a NaN or infinite value")
        start += feature.width
    return out


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _lists(feature: Feature, column: pa.Array) -> Array:
    lengths = pc.list_value_length(column)
    if column.null_count or pc.any(pc.not_equal(lengths, feature.width)).as_py():
        raise ValueError(f"{feature.name}: expected lists of {feature.width} numbers in every row")
    return np.asarray(_numbers(feature.name, pc.list_flatten(column))).reshape(len(column), feature.width)


def _numbers(name: str, column: pa.Array) -> Array:
    if column.null_count:
        raise ValueError(f"{name}: expected a number in every row, got {column.null_count} empty ones")
    try:
        return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False))
    except pa.ArrowException as error:
        raise ValueError(f"{name}: expected numbers, got {column.type}") from error


def encode_time(name: str, column: pa.ChunkedArray) -> Array:
    """Seconds, float64; timestamps are counted from 1970."""
    flat = column.combine_chunks()
    if pa.types.is_timestamp(flat.type):
        flat = flat.cast(pa.timestamp("us")).cast(pa.int64())
        return _finite(name, _numbers(name, flat) / 1e6)
    return _finite(name, _numbers(name, flat))


def encode_label(name: str, column: pa.ChunkedArray) -> Array:
    """Labels in [0, 1], float32."""
    flat = column.combine_chunks()
    values = _numbers(name, flat.cast(pa.int8()) if pa.types.is_boolean(flat.type) else flat)
    if not ((values >= 0) & (values <= 1)).all():
        bad = values[~((values >= 0) & (values <= 1))][0]
        raise ValueError(f"{name}: expected labels in [0, 1], got {bad:g}")
    return values.astype(np.float32)


def encode_weight(name: str, column: pa.ChunkedArray) -> Array:
    """Weights >= 0, float32."""
    values = _finite(name, _numbers(name, column.combine_chunks()))
    if (values < 0).any():
        raise ValueError(f"{name}: expected weights >= 0, got {values.min():g}")
    return values.astype(np.float32)


def _finite(name: str, values: Array) -> Array:
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite numbers, got a NaN or infinite value")
    return values


def entity_keys(name: str, column: pa.ChunkedArray) -> pa.Array:
    """Entity keys as int64 or as strings; anything else is refused, because 7, 7.0 and "7" would be three members."""
    flat = column.combine_chunks()
    if pa.types.is_dictionary(flat.type):
        flat = flat.dictionary_decode()
    if flat.null_count:
        raise ValueError(f"{name}: expected a key in every row, got {flat.null_count} empty ones")
    if pa.types.is_integer(flat.type):
        return flat.cast(pa.int64())
    if pa.types.is_string(flat.type) or pa.types.is_large_string(flat.type):
        return flat.cast(pa.string())
    raise TypeError(f"{name}: expected integer or string keys, got {flat.type}")


def event_numbers(table: pa.Table, schema: Schema) -> Array:
    """A number per event by which a second delivery is recognized, uint64: equal exactly where the columns are."""
    names = [schema.entity, schema.event] if schema.event else list(schema.columns)
    parts = []
    for name in names:
        column = table[name].combine_chunks()
        if _is_list(column.type):
            parts.append(np.asarray([_hash(v) for v in column.to_pylist()], np.uint64))
            continue
        encoded = column.dictionary_encode()
        values = np.asarray([_hash(v) for v in encoded.dictionary.to_pylist()] or [0], np.uint64)
        parts.append(values[encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)])
    with np.errstate(over="ignore"):
        total = np.zeros(table.num_rows, np.uint64)
        for part in parts:  # the finalizer of splitmix64 between columns, so that their order counts
            total = (total ^ part) * np.uint64(0xBF58476D1CE4E5B9)
            total ^= total >> np.uint64(31)
    return total
