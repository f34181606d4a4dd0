"""Spoils a file: its bytes, or what it says behind valid checksums."""

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any


def mutate_file(path: Path, rng: random.Random) -> str:
    """Spoil a file: half of the time what it says, behind valid checksums, else its bytes.

    Args:
        path: The file, changed in place.
        rng: Source of chance.

    Returns:
        What was done.
    """
    by_format = _FORMATS.get(path.suffix)
    if by_format is not None and rng.random() < 0.5:
        return by_format(path, rng)
    data = bytearray(path.read_bytes())
    name, change = rng.choice(_BYTES)
    path.write_bytes(change(data, rng))
    return name


def _span(data: bytearray, rng: random.Random) -> slice:
    start = rng.randrange(len(data) + 1)
    return slice(start, min(len(data), start + rng.choice((1, 2, 4, 8, 64, 1024))))


def _flip(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _overwrite(data: bytearray, rng: random.Random) -> bytes:
    span = _span(data, rng)
    data[span] = bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * (span.stop - span.start)
    return bytes(data)


def _insert(data: bytearray, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return bytes(data[:at]) + rng.randbytes(rng.choice((1, 3, 8, 100))) + bytes(data[at:])


def _delete(data: bytearray, rng: random.Random) -> bytes:
    del data[_span(data, rng)]
    return bytes(data)


def _repeat(data: bytearray, rng: random.Random) -> bytes:
    span = _span(data, rng)
    return bytes(data[: span.stop]) + bytes(data[span]) + bytes(data[span.stop :])


def _digits(data: bytearray, rng: random.Random) -> bytes:
    places = [i for i, byte in enumerate(data) if 48 <= byte < 58]
    if not places:
        return _flip(data, rng)
    at = rng.choice(places)
    return bytes(data[:at]) + rng.choice((b"-1", b"99999999999999999999", b"1e400", b"NaN", b"x", b"")) + data[at + 1 :]


_BYTES: list[tuple[str, Callable[[bytearray, random.Random], bytes]]] = [
    ("bits flipped", _flip),
    ("bytes overwritten", _overwrite),
    ("bytes inserted", _insert),
    ("bytes deleted", _delete),
    ("bytes repeated", _repeat),
    ("a digit replaced", _digits),
    ("truncated", lambda data, rng: bytes(data[: rng.randrange(len(data) + 1)])),
    ("emptied", lambda *_: b""),
]

_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    -1e308,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x00",
    [],
    {},
)


def _mutate_json_value(value: Any, rng: random.Random) -> Any:
    """A copy with one thing changed, somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        way = rng.random()
        if way < 0.15:
            return rest
        if way < 0.25:
            return rest | {f"{key}_": value[key]}
        return value | {key: _mutate_json_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        way = rng.random()
        if way < 0.15:
            return value[:at] + value[at + 1 :]
        if way < 0.25:
            return [*value, value[at]]
        return [*value[:at], _mutate_json_value(value[at], rng), *value[at + 1 :]]
    if rng.random() < 0.03:
        nested: Any = 0
        for _ in range(500):
            nested = [nested]
        return nested
    return rng.choice(_VALUES)


def _json(path: Path, rng: random.Random) -> str:
    path.write_text(json.dumps(_mutate_json_value(json.loads(path.read_text()), rng)))
    return "a JSON value changed"


def _json_lines(path: Path, rng: random.Random) -> str:
    lines = path.read_text().splitlines()
    if not lines:
        return _json_lines_empty(path)
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(_mutate_json_value(json.loads(lines[at]), rng))
    path.write_text("\n".join(lines) + "\n")
    return f"line {at + 1} changed"


def _json_lines_empty(path: Path) -> str:
    path.write_text("null\n")
    return "a line added"


def _csv(path: Path, rng: random.Random) -> str:
    rows = list(csv.reader(io.StringIO(path.read_text())))
    row = rng.choice(rows) if rows else []
    cells = ("", "-1", "nan", "inf", "1e400", "99999999999999999999", "x", '"', "\x00", "1,2")
    if row and rng.random() < 0.8:
        row[rng.randrange(len(row))] = rng.choice(cells)
    elif row:
        row.pop()
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    path.write_text(text.getvalue())
    return "a cell changed"


def _mutate_array(array: Any, rng: random.Random) -> Any:
    import numpy as np

    way = rng.randrange(8)
    if way == 0:
        return array[:-1] if array.ndim else array.reshape(1)
    if way == 1:
        return array[None] if rng.random() < 0.5 else array.reshape(-1)
    if way == 2:
        return array[:0] if array.ndim else np.zeros(0)
    if way == 3:
        kinds: list[Any] = [np.float16, np.float64, np.int64, np.uint8, np.complex128, np.bool_, "U3", "M8[s]"]
        with np.errstate(all="ignore"):
            try:
                return array.astype(rng.choice(kinds))
            except (TypeError, ValueError, OverflowError):
                return np.zeros(array.shape)
    changed = np.array(array)
    if changed.size == 0 or changed.dtype.kind not in "fiu":
        return np.zeros(3)
    place = rng.randrange(changed.size)
    limits = np.iinfo(changed.dtype) if changed.dtype.kind in "iu" else np.finfo(changed.dtype)
    values = [limits.min, limits.max, -1, 0, 1, 2**30] if changed.dtype.kind == "i" else [limits.min, limits.max, 0]
    values += [np.nan, np.inf, -np.inf, -1.0] if changed.dtype.kind == "f" else []
    changed.reshape(-1)[place if rng.random() < 0.7 else slice(None)] = rng.choice(values)
    return changed


def _mutate_arrays(arrays: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    if not arrays:
        return {"x": _mutate_array(__import__("numpy").zeros(3), rng)}
    key = rng.choice(sorted(arrays))
    rest = {k: v for k, v in arrays.items() if k != key}
    way = rng.random()
    if way < 0.15:
        return rest
    return rest | {(f"{key}_" if way < 0.25 else key): _mutate_array(arrays[key], rng)}


def _npz(path: Path, rng: random.Random) -> str:
    import numpy as np

    with np.load(path, allow_pickle=False) as stored:
        arrays = _mutate_arrays(dict(stored), rng)
    if rng.random() < 0.1 and arrays:  # what `allow_pickle=False` must refuse
        arrays[rng.choice(sorted(arrays))] = np.array([None, {}], dtype=object)
    np.savez(path, **arrays)
    return "an array changed"


def _npy(path: Path, rng: random.Random) -> str:
    import numpy as np

    np.save(path, _mutate_array(np.load(path, allow_pickle=False), rng))
    return "the array changed"


def _safetensors(path: Path, rng: random.Random) -> str:
    """One tensor changed, or the JSON header alone, so that it no longer fits the bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if rng.random() < 0.5:
        import safetensors.numpy

        try:
            arrays = _mutate_arrays(safetensors.numpy.load(data), rng)
            arrays = {k: v if v.dtype.kind in "fiub" else v.astype("U3").view("u4") for k, v in arrays.items()}
            meta = {k: str(v) for k, v in header.get("__metadata__", {}).items()}
            path.write_bytes(safetensors.numpy.save({k: v.copy() for k, v in arrays.items()}, meta))
        except Exception:  # a dtype that numpy does not have
            path.write_bytes(data[: rng.randrange(len(data))])
        return "a tensor changed"
    text = json.dumps(_mutate_json_value(header, rng)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return "the header changed"


def _mutate_table(table: Any, rng: random.Random) -> Any:
    import pyarrow as pa

    if table.num_columns == 0:
        return table
    at = rng.randrange(table.num_columns)
    name, column = table.column_names[at], table.column(at)
    way = rng.randrange(8)
    if way == 0:
        return table.remove_column(at)
    if way == 1:
        return table.rename_columns([n + "_" if i == at else n for i, n in enumerate(table.column_names)])
    if way == 2:
        return table.slice(0, 0)
    if way == 3:
        return table.append_column(name, column)
    values = column.to_pylist()
    if way == 4:
        kinds = [pa.string(), pa.float64(), pa.int8(), pa.int64(), pa.bool_(), pa.date32(), pa.large_string()]
        try:
            return table.set_column(at, name, column.cast(rng.choice(kinds), safe=False))
        except pa.ArrowException:
            return table.set_column(at, name, pa.array([None] * len(values)))
    if values:
        place = rng.randrange(len(values))
        number = isinstance(values[place], int | float)
        values[place] = rng.choice([None, -1, 2**31 - 1, 0] if number else [None, "", "x"])
        if isinstance(values[place], int) and isinstance(column[place].as_py(), float):
            values[place] = rng.choice([float("nan"), float("inf"), -1e308])
    try:
        return table.set_column(at, name, pa.array(values, type=column.type))
    except (pa.ArrowException, OverflowError, TypeError):
        return table.set_column(at, name, pa.array([None] * len(values)))


def _parquet(path: Path, rng: random.Random) -> str:
    import pyarrow.parquet

    pyarrow.parquet.write_table(_mutate_table(pyarrow.parquet.ParquetFile(path).read(), rng), path)
    return "a column changed"


def _arrow(path: Path, rng: random.Random) -> str:
    import pyarrow as pa

    data = path.read_bytes()
    is_file = data.startswith(b"ARROW1")
    source = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(pa.BufferReader(data))
    table = _mutate_table(source.read_all(), rng)
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(path, table.schema) as sink:
        sink.write_table(table)
    return "a column changed"


_FORMATS: dict[str, Callable[[Path, random.Random], str]] = {
    ".arrow": _arrow,
    ".csv": _csv,
    ".feather": _arrow,
    ".json": _json,
    ".jsonl": _json_lines,
    ".npy": _npy,
    ".npz": _npz,
    ".parquet": _parquet,
    ".safetensors": _safetensors,
}
