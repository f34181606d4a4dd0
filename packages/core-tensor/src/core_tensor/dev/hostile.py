"""What nobody should pass and everybody will: mutated arguments for operators, mutated files for readers.

`tools/hostile.py` runs both over all packages; a package lists its readers in `tests/hostile_readers.py`.
"""

import csv
import dataclasses
import io
import json
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from core_tensor.app.extras import MissingExtraError

ALLOWED = (ValueError, TypeError, OSError, MissingExtraError)
"""How bad input may end; it must say something, too."""


class Reader(NamedTuple):
    """A reader of files that somebody else can have written.

    Attributes:
        name: For messages.
        make: Writes a small valid file, or a folder of files, into an empty folder and returns its path.
        read: Reads that path, and uses what it has read.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]


class Failure(NamedTuple):
    """Bad input that did not end in a clear error.

    Attributes:
        name: The reader or operator.
        seed: Repeats the case.
        change: What was mutated.
        error: What came instead of a clear error.
    """

    name: str
    seed: int
    change: str
    error: str

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed} ({self.change}): {self.error}"


def outcome(call: Callable[[], object], seconds: int = 10) -> str | None:
    """Run a call on bad input.

    Args:
        call: The call.
        seconds: How long it may take.

    Returns:
        None where it succeeded or ended in a clear error, else what went wrong.
    """
    try:
        with _time_limit(seconds):
            call()
    except ALLOWED as error:
        return None if str(error).strip() else f"{type(error).__name__} without a message"
    except MemoryError:
        return None
    except RuntimeError as error:  # torch's own way to say that there is too little memory
        return None if "can't allocate memory" in str(error) else f"RuntimeError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


class _TooSlow(BaseException):  # not an Exception: no reader may catch it
    pass


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    except _TooSlow:
        raise RuntimeError(f"took more than {seconds} s") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def hostile_files(
    reader: Reader, folder: Path, rounds: int, seed: int, note: Callable[[str], object] = str
) -> Iterator[Failure]:
    """Read mutated copies of a valid file.

    Args:
        reader: The reader.
        folder: An empty folder to work in.
        rounds: Number of mutated copies.
        seed: Of the first copy; the next ones count up.
        note: Is told every case before it runs, should the process not survive it.

    Yields:
        What did not end in success or a clear error.
    """
    origin = folder / "origin"
    origin.mkdir()
    made = reader.make(origin)
    inside = made.relative_to(origin)
    reader.read(_copy(origin, folder / "valid") / inside)  # the valid file reads
    files = sorted(
        path.relative_to(origin) for path in ([made] if made.is_file() else made.rglob("*")) if path.is_file()
    )
    for number in range(seed, seed + rounds):
        rng = random.Random(number)
        copy = _copy(origin, folder / "mutated")
        target = rng.choice(files)
        change = mutate_file(copy / target, rng)
        note(f"{reader.name}, seed {number} ({target}: {change})")
        error = outcome(lambda copy=copy: reader.read(copy / inside))  # type: ignore[misc]
        if error is not None:
            yield Failure(reader.name, number, f"{target}: {change}", error)


def _copy(origin: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(origin, target))


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

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def hostile_calls(
    name: str,
    make: Callable[[random.Random], tuple[Callable[..., object], dict[str, Any]]],
    rounds: int,
    seed: int,
    note: Callable[[str], object] = str,
) -> Iterator[Failure]:
    """Call a function with mutated arguments.

    Args:
        name: The function's name, for messages.
        make: The function and valid arguments by name, drawn at random.
        rounds: Number of calls.
        seed: Of the first call; the next ones count up.
        note: Is told every case before it runs, should the process not survive it.

    Yields:
        What did not end in success or a clear error.
    """
    for number in range(seed, seed + rounds):
        rng = random.Random(number)
        function, arguments = make(rng)
        changes = []
        for _ in range(rng.choice((0, 1, 1, 1, 2)) if number > seed else 0):  # the first call is valid
            key = rng.choice(sorted(arguments))
            arguments[key], change = mutate(arguments[key], rng)
            changes.append(f"{key}: {change}")
        note(f"{name}, seed {number} ({'; '.join(changes)})")
        if not changes:
            function(**arguments)
            continue
        error = outcome(lambda function=function, arguments=arguments: function(**arguments))  # type: ignore[misc]
        if error is not None:
            yield Failure(name, number, "; ".join(changes), error)


_NUMBERS = (-1, 0, 1, 7, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**400, 0.5, None, "3", True, [1])
_REALS = (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, 10**400, None, "x", 1j)


def mutate(value: Any, rng: random.Random) -> tuple[Any, str]:
    """Spoil an argument.

    Args:
        value: A valid argument.
        rng: Source of chance.

    Returns:
        What to pass instead, and what was done.
    """
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_meta or value.is_nested:  # spoiled already
            return value, "nothing"
        way, change = rng.choice(_TENSORS)
        return change(value, rng), way
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        field = rng.choice([f.name for f in dataclasses.fields(value)])
        changed, way = mutate(getattr(value, field), rng)
        return dataclasses.replace(value, **{field: changed}), f"{field}: {way}"
    if isinstance(value, list | tuple) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        changed, way = mutate(value[at], rng)
        return type(value)([*value[:at], changed, *value[at + 1 :]]), f"[{at}]: {way}"
    if isinstance(value, bool):
        other: Any = rng.choice((not value, None, "yes", 2))
    elif isinstance(value, int):
        other = rng.choice(_NUMBERS)
    elif isinstance(value, float):
        other = rng.choice(_REALS)
    else:
        other = rng.choice((None, 3, "x", torch.zeros(2), [], [torch.zeros(1)], {}))
    return other, f"{str(other)[:30]} of type {type(other).__name__}"


def _dtype(t: Any, rng: random.Random) -> Any:
    import torch

    kinds = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool", "complex64")
    return t.to(getattr(torch, rng.choice(kinds)))


def _shape(t: Any, rng: random.Random) -> Any:
    ways: list[Callable[[], Any]] = [lambda: t.unsqueeze(rng.randrange(t.ndim + 1)), lambda: t.reshape(-1)]
    if t.ndim:
        axis = rng.randrange(t.ndim)
        ways += [
            lambda: t.narrow(axis, 0, max(t.shape[axis] - 1, 0)),
            lambda: t.narrow(axis, 0, 0),
            lambda: t.repeat_interleave(2, axis),
            lambda: t.mT if t.ndim > 1 else t.flip(0),
            lambda: t.select(axis, 0) if t.shape[axis] else t,
        ]
    return rng.choice(ways)()


def _strides(t: Any, rng: random.Random) -> Any:
    """The same values at other places in memory."""
    if t.ndim == 0 or t.numel() == 0:
        return t
    axis = rng.randrange(t.ndim)
    way = rng.randrange(4)
    if way == 0:
        return t.repeat_interleave(3, axis).movedim(axis, 0)[1::3].movedim(0, axis)
    if way == 1 and t.ndim > 1:
        return t.mT.contiguous().mT
    if way == 2:
        return t.narrow(axis, 0, 1).expand_as(t)
    padded = t.new_empty(t.numel() + 3)
    return padded[3:].copy_(t.reshape(-1)).view(t.shape)  # not aligned as an allocation of its own


def _entries(t: Any, rng: random.Random) -> Any:
    import torch

    if t.numel() == 0:
        return t
    changed = t.detach().clone(memory_format=torch.contiguous_format)
    flat = changed.view(-1)
    if t.dtype is torch.bool:
        flat.logical_not_()
        return changed
    if t.dtype.is_floating_point:
        limit = torch.finfo(t.dtype)
        values = [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, limit.max, limit.min, limit.tiny]
    elif t.dtype.is_complex:
        values = [0.0]
    else:
        whole = torch.iinfo(t.dtype)
        values = [whole.min, whole.max, -1, 0, 1, 5, 64, 2**20, 2**30, 2**31, 2**40, 2**62]
        values = [v for v in values if whole.min <= v <= whole.max]
    value = rng.choice(values)
    flat[rng.randrange(flat.numel()) if rng.random() < 0.6 else slice(None)] = value
    return changed


def _scaled(t: Any, rng: random.Random) -> Any:
    return t * rng.choice((1e-300, 1e-30, 1e30, 1e300, -1)) if t.dtype.is_floating_point else t * -1


def _nested(t: Any) -> Any:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        return torch.nested.nested_tensor([t])


def _kind(t: Any, rng: random.Random) -> Any:
    import torch

    ways: list[Callable[[], Any]] = [
        lambda: t.to("meta"),
        lambda: t.to_sparse(),
        lambda: None,
        lambda: t.tolist() if t.numel() < 100 else 3,
        lambda: t.detach().float().numpy(),
        lambda: t.clone().requires_grad_() if t.dtype.is_floating_point else 3.0,
        lambda: torch.complex(t.double(), t.double()).conj().imag if t.dtype.is_floating_point else "x",
        lambda: _nested(t) if t.ndim and t.dtype.is_floating_point else [],
    ]
    return rng.choice(ways)()


_TENSORS: Sequence[tuple[str, Callable[[Any, random.Random], Any]]] = [
    ("another dtype", _dtype),
    ("another shape", _shape),
    ("other strides", _strides),
    ("entries changed", _entries),
    ("entries changed", _entries),
    ("entries changed", _entries),
    ("scaled", _scaled),
    ("another kind of object", _kind),
]
