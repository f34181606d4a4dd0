"""A first schema from a log: what each column probably is. It is a draft to read and edit."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from lirank.data.parquet import ParquetLog
from lirank.schema.columns import as_float, as_lists, column_of, decoded
from lirank.schema.features import Dense, Feature, Id, Label, Multi, Schema, Time
from lirank.schema.hashing import fingerprints

_LABELS = ("label", "click", "clicked", "is_click", "liked", "target", "conversion", "y")
_TIMES = ("time", "timestamp", "ts", "event_time", "datetime", "date")
_GROUPS = ("user", "user_id", "userid", "member", "member_id", "query", "query_id", "session", "session_id", "uid")
_WORDS = ("id", "user", "item", "code", "category", "brand", "city", "country", "hash")


def infer_schema(
    log: ParquetLog, labels: Sequence[str] = (), time: str = "", group: str = "", rows: int = 200_000
) -> Schema:
    """Propose a schema.

    Strings, and integers that look like ids, become hashed ids with four rows per distinct value; other numbers become
    dense, lists multi-valued. Labels, time and group are taken by name where they are not given.

    Args:
        log: The log.
        labels: Columns of the labels.
        time: Column of the time.
        group: Column of the ranking group.
        rows: Rows that are looked at.

    Returns:
        The schema.

    Raises:
        ValueError: If no label is given and none is found, or a named column is missing.
    """
    names = log.schema.names
    log.require([*labels, *filter(None, (time, group))])
    table = next(log.read(rows=rows))
    labels = labels or [name for name in names if name.lower() in _LABELS][:1]
    if not labels:
        raise ValueError(f"labels: expected a column called {', '.join(_LABELS)}; name one of {', '.join(names)}")
    time = time or next((n for n in names if n.lower() in _TIMES and _is_time(table.schema.field(n).type)), "")
    group = group or next((n for n in names if n.lower() in _GROUPS), "")
    taken = {*labels, time}
    features = [_feature(table, name, forced=name == group) for name in names if name not in taken]
    found = [feature for feature in features if feature is not None]
    known = [feature.name for feature in found if isinstance(feature, Id)]
    return Schema(
        features=tuple(found),
        labels=tuple(_label(table, name) for name in labels),
        time=Time(column=time) if time else None,
        group=group if group in known else "",
    )


def doubts(log: ParquetLog, schema: Schema, rows: int = 200_000) -> list[str]:
    """What a draft may have taken for a feature though nobody knows it when a row is scored.

    Args:
        log: The log.
        schema: What `infer_schema` proposed for it.
        rows: Rows that are looked at.

    Returns:
        One sentence for each column.
    """
    table, found = next(log.read(rows=rows)), []
    for feature in schema.of(Id, Dense):
        if {"position", "rank", "slot"} & set(_words(feature.name)):
            advice = (
                f"if it is the place at which a row was shown, put `position: {feature.name}` in place of the feature"
            )
            found.append(f"{feature.name}: {advice}")
        elif isinstance(feature, Dense) or feature.type == "int":
            values = as_float(feature.name, column_of(table, feature.name))
            if np.isin(values[~np.isnan(values)], (0, 1)).all():
                found.append(f"{feature.name}: holds 0 and 1; if it is an outcome, make it a label or remove it")
    return found


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_integer(kind) or pa.types.is_date(kind))


def _label(table: pa.Table, name: str) -> Label:
    array = column_of(table, name)
    values = as_float(name, array)
    known = values[~np.isnan(values)]
    missing: Literal["skip", "error"] = "skip" if array.null_count else "error"
    if len(known) and not np.isin(known, (0, 1)).all():
        return Label(name=name, at_least=float(np.median(known)), missing=missing)
    return Label(name=name, missing=missing)


def _feature(table: pa.Table, name: str, *, forced: bool) -> Feature | None:
    array = column_of(table, name)
    kind = decoded(array.slice(0, 0)).type
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        values, _ = as_lists(name, array)
        type_ = _id_type(decoded(values.slice(0, 0)).type)
        return None if type_ == "" else Multi(name=name, type=type_, rows=_rows(name, values, type_))
    type_ = _id_type(kind)
    if type_ == "string" or (type_ == "int" and (forced or _looks_like_id(name, array))):
        return Id(name=name, type=type_, rows=_rows(name, array, type_))
    if type_ == "int" or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = as_float(name, array)
        known = values[np.isfinite(values)]
        skewed = len(known) > 0 and known.min() >= 0 and known.max() > 100 * max(float(np.median(known)), 1.0)
        missing: Literal["mean", "error"] = "mean" if array.null_count else "error"
        return Dense(name=name, transform="log1p" if skewed else "zscore", missing=missing)
    return None  # dates, structs and the like: nothing to offer


def _id_type(kind: pa.DataType) -> Literal["int", "string", ""]:
    if pa.types.is_large_string(kind):
        return "string"
    return "int" if pa.types.is_integer(kind) or pa.types.is_boolean(kind) else ""


def _looks_like_id(name: str, array: pa.Array) -> bool:
    if any(word in _words(name) for word in _WORDS) or pa.types.is_boolean(array.type):
        return True
    return len(fingerprints(name, array, "int")[0]) > 0 and len(np.unique(fingerprints(name, array, "int")[0])) <= 2


def _words(name: str) -> list[str]:
    return name.lower().replace("-", "_").split("_")


def _rows(name: str, array: pa.Array, type_: str) -> int:
    distinct = len(np.unique(fingerprints(name, array, type_)[0]))
    return max(64, 1 << int(np.ceil(np.log2(4 * distinct + 4))))
