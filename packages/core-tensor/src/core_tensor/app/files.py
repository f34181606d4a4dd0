"""Files that are either complete or absent, and readers whose every failure names the file.

A write goes to a temporary file that is then renamed. The temporary file keeps the final name, since writers choose a
format by it, and sits in a hidden folder `.partial-<process>-...` beside it, so that no reader's pattern matches it.
`sweep` removes what killed processes left; the first write of a process into a folder does so too.
"""

import hashlib
import io
import json
import os
import re
import shutil
import socket
import struct
import sys
import tempfile
import tokenize
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_PARTIAL = ".partial-"
_READERS = frozenset(
    {"safetensors", "safetensors_rust", "pyarrow", "PIL", "yaml", "msgspec", "lmdb", "sqlite3", "polars", "csv", "gguf"}
)
"""Packages whose own exceptions mean that a file is broken or foreign."""
_SWEPT: set[Path] = set()
"""Folders that this process has swept: one look at each, however many files it gets."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path; on success it replaces `path`, on an exception it is removed.

    Args:
        path: Final path; its folder is created.

    Yields:
        Path to write to, in a hidden folder beside `path` and with the same name.

    Raises:
        OSError: If the system refuses to write, naming `path`.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.parent not in _SWEPT:
        _SWEPT.add(final.parent)
        sweep(final.parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{_owner(os.getpid())}-", dir=final.parent))
    temporary = folder / final.name
    try:
        with naming(final):
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_buffered(path: str | os.PathLike[str], save: Callable[[BinaryIO], object]) -> None:
    """Write atomically what a function saves into a file object, by way of memory.

    For writers that are lost where the disk is full: torch's zip writer raises errors that do not say so, and ends the
    process when its destructor tries again.

    Args:
        path: Final path.
        save: Writes to the file object that it is given.

    Raises:
        OSError: If the system refuses to write, naming `path`.
    """
    buffer = io.BytesIO()
    save(buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let what the operating system refuses inside name a file, where it does not itself: a full disk never does.

    Args:
        path: What is being written.

    Raises:
        OSError: The same error, with a file name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def reserve(path: str | os.PathLike[str], size: int) -> None:
    """Take room on the disk for a file that will be written through a memory map.

    A map of a file with holes ends the process (SIGBUS) when the disk is full; this fails in time instead.

    Args:
        path: A file, which is created or lengthened.
        size: Its size, in bytes.

    Raises:
        OSError: If there is no room, naming the file.
    """
    with naming(path), Path(path).open("ab") as file:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _owner(process: int) -> str:
    """This machine and a process, as part of a file name."""
    return f"{re.sub(r'[^A-Za-z0-9]', '', socket.gethostname()) or 'host'}-{process}"


def sweep(folder: str | os.PathLike[str]) -> int:
    """Remove the temporary files of killed processes; those of live processes, and of other machines, stay.

    Args:
        folder: Folder to look at, without its subfolders. It may be absent.

    Returns:
        How many were removed.
    """
    here = _owner(0).removesuffix("-0")
    removed = 0
    for partial in Path(folder).glob(f"{_PARTIAL}{here}-*"):
        process = partial.name.removeprefix(f"{_PARTIAL}{here}-").split("-")[0]
        if process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(partial, ignore_errors=True)
            removed += 1
    return removed


def is_partial(path: Path) -> bool:
    """Whether a path is a folder of `atomic_path`, whose owner may be another machine.

    Args:
        path: Any path.

    Returns:
        True or false, by the name.
    """
    return path.name.startswith(_PARTIAL)


def _alive(process: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False
    except PermissionError:
        return True
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically.

    Args:
        path: Final path.
        text: Content.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON atomically; NaN and infinities are refused, because JSON has none.

    Args:
        path: Final path.
        value: Anything `json.dumps` takes.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def reading(path: str | os.PathLike[str], expected: str) -> Iterator[None]:
    """Turn every way in which a broken or foreign file can fail a reader into one error that names the file.

    The body reads one file and checks what it found. Errors of the operating system (absent file, no permission) pass
    through, since they name the file themselves, and so does a ValueError that already does.

        with reading(path, "the policy of polytope-lp"):
            arrays = numpy.load(path, allow_pickle=False)

    Args:
        path: File being read.
        expected: What it should hold, for the message.

    Raises:
        ValueError: If the body fails to parse the file.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        if not _means_broken_file(error):
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: expected {expected} ({why})") from error


def _means_broken_file(error: Exception) -> bool:
    """Whether parsing untrusted bytes can raise this error; a failed assertion, for one, is a bug."""
    parsing = (
        *(OSError, ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, MemoryError),
        *(ZeroDivisionError, RecursionError, NotImplementedError, SyntaxError, struct.error, zlib.error),
        *(zipfile.BadZipFile, tokenize.TokenError),  # numpy reads the header of an array as Python
    )
    kinds = type(error).__mro__
    return isinstance(error, parsing) or any(kind.__module__.split(".")[0] in _READERS for kind in kinds)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON.

    Args:
        path: File to read.

    Returns:
        The parsed value.

    Raises:
        ValueError: If the file is not JSON.
    """
    with reading(path, "a JSON file"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read TOML.

    Args:
        path: File to read.

    Returns:
        The parsed table.

    Raises:
        ValueError: If the file is not TOML.
    """
    with reading(path, "a TOML file"):
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))


def read_npz(path: str | os.PathLike[str], *names: str) -> dict[str, Any]:
    """Read all arrays of an npz file; nothing is ever unpickled.

    Args:
        path: File to read.
        names: Arrays that must be there.

    Returns:
        Name to numpy array.

    Raises:
        ValueError: If the file is no complete npz file of plain arrays, or an array is missing.
    """
    import numpy as np

    with reading(path, "an npz file of arrays"), Path(path).open("rb") as stream:
        loaded = np.load(stream, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("a single array (npy)")
        arrays = {name: loaded[name] for name in loaded.files}
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"no array {', '.join(missing)}; it has {', '.join(arrays) or 'none'}")
        return arrays


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, read in pieces.

    Args:
        path: File to read.

    Returns:
        Hexadecimal digest.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: Any) -> str:
    """128-bit digest of data: what a run folder records of its inputs, so that other data of the same shape is refused.

    Args:
        parts: Tensors, numpy arrays, bytes, strings, numbers or None; a path means the content of the file, or of
            all files below the folder with their names.

    Returns:
        32 hexadecimal digits. Shape and dtype count, memory layout and device do not.

    Raises:
        TypeError: If a part is of another kind.
    """
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        for piece in _pieces(part):
            total.update(piece)
        total.update(b"|")
    return total.hexdigest()


def _pieces(part: Any) -> Iterator[bytes | memoryview]:
    """The bytes of one part of a digest."""
    if isinstance(part, bytes | bytearray | memoryview):
        yield f"bytes {len(part)} ".encode()
        yield bytes(part)
    elif part is None or isinstance(part, str | bool | int | float):
        yield f"{type(part).__name__} {part!r}".encode()
    elif isinstance(part, Path):
        files = [part] if part.is_file() else sorted(p for p in part.rglob("*") if p.is_file())
        for file in files:
            name = "" if part.is_file() else file.relative_to(part).as_posix()
            yield f"file {name} {sha256(file)} ".encode()
    elif hasattr(part, "detach"):  # a tensor, without importing torch to ask
        plain = part.detach().cpu().contiguous()
        yield f"array {tuple(plain.shape)} {str(plain.dtype).removeprefix('torch.')} ".encode()
        yield from _raw(plain.reshape(-1).view(sys.modules["torch"].uint8).numpy())
    elif hasattr(part, "__array_interface__"):
        import numpy as np

        plain = np.ascontiguousarray(part)
        if plain.dtype.hasobject:
            raise TypeError("digest: expected plain arrays, got an array of Python objects")
        yield f"array {tuple(part.shape)} {plain.dtype} ".encode()
        yield from _raw(plain.reshape(-1).view(np.uint8))
    else:
        raise TypeError(
            f"digest: expected tensors, arrays, bytes, strings, numbers or paths, got {type(part).__name__}"
        )


def _raw(flat: Any) -> Iterator[memoryview]:
    """The bytes of a flat array, where there are any."""
    if flat.size:
        yield flat.data
