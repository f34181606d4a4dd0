"""From columns to numbers: vocabularies, hashed categories, dense columns, entity keys, event numbers."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meta_embed.tasks.schema import Feature, Schema

Array = np.ndarray[Any, Any]
LONGEST_KEY = 511
"""Bytes of an entity key; LMDB takes no longer ones."""
LATEST = 1e11
"""Seconds since 1970, of the year 5138: a greater time is in milliseconds, or finer."""
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
            values = pc.unique(categories(feature.name, table[feature.name])).to_pylist()
            found[feature.name] = sorted(v for v in values if v is not None)
    return found


def rows_of_table(feature: Feature, vocabulary: Vocabulary) -> int:
    """How many rows the embedding table of a category needs."""
    return feature.buckets or len(vocabulary[feature.name]) + 1


def encode_ids(table: pa.Table, features: Sequence[Feature], vocabulary: Vocabulary) -> Array:
    """Table rows of the categories, shape (N, number of `id` features), int64.

    Args:
        table: Rows.
        features: Columns.
        vocabulary: Of those that are not hashed.

    Returns:
        Rows of the tables.

    Raises:
        ValueError: If a category is text where the vocabulary has integers, or the other way round.
    """
    chosen = [f for f in features if f.kind == "id"]
    out = np.zeros((table.num_rows, len(chosen)), np.int64)
    for j, feature in enumerate(chosen):
        encoded = categories(feature.name, table[feature.name]).dictionary_encode()
        values = encoded.dictionary.to_pylist()
        if feature.buckets:
            rows = [_hash(str(value)) % feature.buckets for value in values]  # 7 and "7" are one category
        else:
            index = {value: i + 1 for i, value in enumerate(vocabulary[feature.name])}
            _check_kind(feature.name, values, vocabulary[feature.name])
            rows = [index.get(value, 0) for value in values]
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        if len(rows):
            out[:, j] = np.where(codes >= 0, np.asarray(rows, np.int64)[codes], 0)
    return out


def _check_kind(name: str, values: Sequence[Any], known: Sequence[Any]) -> None:
    """Refuse text where training saw integers, and the other way round: every value would pass for an unknown one."""
    for value in values[:1]:
        if known and isinstance(value, str) != isinstance(known[0], str):
            kinds = ("strings", "integers") if isinstance(known[0], str) else ("integers", "strings")
            raise ValueError(f"{name}: expected {kinds[0]}, as in training, got {kinds[1]}")


def categories(name: str, column: pa.ChunkedArray) -> pa.Array:
    """Categories as int64 or as strings, null where there is none.

    Whole numbers in a column of floats are integers: pandas makes floats of integers as soon as one is absent.

    Args:
        name: The column, for the message.
        column: Its values.

    Returns:
        An array.

    Raises:
        ValueError: If a number has a fraction or does not fit into 64 bits.
        TypeError: If values are neither text nor numbers.
    """
    flat = _plain(column)
    if pa.types.is_floating(flat.type):
        values = np.asarray(flat.cast(pa.float64()).to_numpy(zero_copy_only=False))
        absent = np.isnan(values)  # null, too
        whole = np.where(absent, 0.0, values)
        if not ((whole == np.round(whole)) & (np.abs(whole) < 2**53)).all():
            raise ValueError(f"{name}: expected categories as strings or integers, got {flat.type} with fractions")
        return pa.array(whole.astype(np.int64), mask=absent)
    if pa.types.is_boolean(flat.type):
        return flat.cast(pa.int64())
    if pa.types.is_null(flat.type):
        return flat.cast(pa.string())
    found = _text_or_integers(name, flat)
    if found is None:
        raise TypeError(f"{name}: expected categories as strings or integers, got {flat.type}")
    return found


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """One array, without a dictionary."""
    flat = column.combine_chunks()
    return flat.dictionary_decode() if pa.types.is_dictionary(flat.type) else flat


def _text_or_integers(name: str, flat: pa.Array) -> pa.Array | None:
    """Integers as int64, text of any kind and UUIDs as strings; None for anything else."""
    if pa.types.is_integer(flat.type):
        try:
            return flat.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"{name}: expected integers below 2^63: {error}") from error
    if pa.types.is_string(flat.type) or pa.types.is_large_string(flat.type) or pa.types.is_string_view(flat.type):
        return flat.cast(pa.string())
    if getattr(flat.type, "extension_name", "") == "arrow.uuid":
        return pa.array([None if value is None else str(value) for value in flat.to_pylist()], pa.string())
    return None


def _hash(value: Any) -> int:
    """A number of a category that no machine and no run changes."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little")


def with_scales(table: pa.Table, schema: Schema) -> Schema:
    """The schema with means and scales of the dense features that have none, so that their units do not matter.

    Logit and item vector of a trained ranker stay as they are.

    Args:
        table: Training events.
        schema: Their columns.

    Returns:
        The schema; a number that never changes has the scale 1.
    """

    def measured(feature: Feature) -> Feature:
        if feature.kind != "dense":
            return feature
        values = _dense(table[feature.name].combine_chunks(), feature)
        mean, scale = values.mean(0), values.std(0)
        scale = np.where(scale > 1e-9 * np.abs(mean), scale, 1.0)  # below it, rounding
        return msgspec.structs.replace(
            feature, mean=feature.mean or tuple(mean.tolist()), scale=feature.scale or tuple(scale.tolist())
        )

    row, member = (tuple(measured(f) for f in features) for features in (schema.row, schema.member))
    return msgspec.structs.replace(schema, row=row, member=member)


def _dense(column: pa.Array, feature: Feature) -> Array:
    """Numbers of one column, shape (N, width), float64."""
    if feature.width > 1 and not _is_list(column.type):
        raise ValueError(f"{feature.name}: expected lists of {feature.width} numbers, got {column.type}")
    return _lists(feature, column) if _is_list(column.type) else _numbers(feature.name, column)[:, None]


def encode_dense(table: pa.Table, features: Sequence[Feature]) -> Array:
    """Numbers of the dense columns, (value - mean) / scale, shape (N, sum of widths), float32; they must be finite."""
    chosen = [f for f in features if f.kind == "dense"]
    out = np.zeros((table.num_rows, sum(f.width for f in chosen)), np.float32)
    start = 0
    for feature in chosen:
        values = _dense(table[feature.name].combine_chunks(), feature)
        values = values - np.asarray(feature.mean or 0.0)
        part = out[:, start : start + feature.width]
        part[:] = values / np.asarray(feature.scale or 1.0)
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
    """Seconds, float64; timestamps, to the microsecond, and dates are counted from 1970 UTC."""
    flat = _plain(column)
    if pa.types.is_date(flat.type) or pa.types.is_timestamp(flat.type):
        flat = flat.cast(pa.timestamp("us", getattr(flat.type, "tz", None)), safe=False).cast(pa.int64())
        return _finite(name, _numbers(name, flat) / 1e6)
    if not (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_decimal(flat.type)):
        raise ValueError(f"{name}: expected timestamps, or numbers of seconds, got {flat.type}")
    seconds = _finite(name, _numbers(name, flat))
    if len(seconds) and seconds.max() > LATEST:
        warnings.warn(f"{name}: {seconds.max():.0f} seconds since 1970 is thousands of years ahead", stacklevel=2)
    return seconds


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
    flat = _plain(column)
    if flat.null_count:
        raise ValueError(f"{name}: expected a key in every row, got {flat.null_count} empty ones")
    keys = _text_or_integers(name, flat)
    if keys is None:
        raise TypeError(f"{name}: expected integer or string keys, got {flat.type}; cast them where the file is made")
    if pa.types.is_string(keys.type) and len(keys):
        shortest, longest = pc.min_max(pc.binary_length(keys)).as_py().values()
        if shortest < 1 or longest > LONGEST_KEY:
            wrong = longest if longest > LONGEST_KEY else shortest
            raise ValueError(f"{name}: expected keys of 1 to {LONGEST_KEY} bytes, got one of {wrong}")
    return keys


def event_numbers(table: pa.Table, schema: Schema) -> Array:
    """A number per event by which a second delivery is recognized, uint64: equal exactly where the columns are."""
    names = [schema.entity, schema.event] if schema.event else list(schema.columns)
    parts = []
    times, ids = {schema.time, schema.known}, {f.name for f in (*schema.row, *schema.member) if f.kind == "id"}
    for name in names:
        # the same event whichever tool wrote the file: integers of any width, timestamps of any unit
        column = _plain(table[name])
        if name in times:
            column = pa.array(encode_time(name, table[name]))
        elif name == schema.entity or name in ids:
            column = categories(name, table[name])
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
