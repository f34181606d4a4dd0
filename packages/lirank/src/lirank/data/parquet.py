"""A log of Parquet files: found, checked against what is needed from it, and streamed by row group."""

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_SUFFIXES = (".parquet", ".parq", ".pq")


class Rows(Protocol):
    """What can be streamed in pieces of an exact size: a `ParquetLog`, or a stretch of one."""

    def read(self, columns: Sequence[str] | None = None, *, rows: int = ...) -> Iterator[pa.Table]:
        """Stream pieces of `rows` rows, the last one shorter."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of one file.

    Attributes:
        file: Number of the file in the log.
        group: Number of the row group in the file.
        rows: Rows.
    """

    file: int
    group: int
    rows: int


@dataclass(frozen=True)
class ParquetLog:
    """A file, a folder of files (hive partitions become columns), or several of them.

    Attributes:
        files: Paths, in order.
        partitions: Columns encoded in each file's folders.
        row_groups: All row groups that hold rows, in order.
        schema: Columns and their types, those of partitions last.
    """

    files: tuple[Path, ...]
    partitions: tuple[dict[str, Any], ...]
    row_groups: tuple[RowGroup, ...]
    schema: pa.Schema

    @classmethod
    def open(cls, *sources: str | Path) -> "ParquetLog":
        """Find the files of a log and read their footers.

        Args:
            sources: Files or folders. Names that begin with a dot or an underscore are left out, as Spark's are.

        Returns:
            The log.

        Raises:
            ValueError: If there is no file or no row, a file is broken, or files differ in their columns.
        """
        found = [(path, Path(source)) for source in sources for path in _files(Path(source))]
        if not found:
            raise ValueError(f"{', '.join(map(str, sources))}: expected Parquet files, found none")
        groups: list[RowGroup] = []
        schemas: list[pa.Schema] = []
        for number, (path, _) in enumerate(found):
            with _open(path) as file:
                schemas.append(file.schema_arrow.remove_metadata())
                counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            groups += [RowGroup(number, g, rows) for g, rows in enumerate(counts) if rows]
        if not groups:
            raise ValueError(f"{', '.join(map(str, sources))}: expected at least one row, the files hold none")
        partitions = _typed([_partition(path, root) for path, root in found])
        schema = _common([path for path, _ in found], schemas)
        for name in partitions[0]:
            kind = pa.large_string() if isinstance(partitions[0][name], str | None) else pa.int64()
            if name not in schema.names:
                schema = schema.append(pa.field(name, kind))
        return cls(tuple(path for path, _ in found), tuple(partitions), tuple(groups), schema)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(group.rows for group in self.row_groups)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the size and the footer of every file (footers hold statistics of the contents)."""
        total = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(-8, 2)
                (length,) = struct.unpack("<I", file.read(4))
                file.seek(-8 - min(length, size - 8), 2)
                total.update(struct.pack("<Q", size) + file.read(length))
        return total.hexdigest()

    def require(self, columns: Iterable[str]) -> None:
        """Refuse a log without these columns.

        Args:
            columns: Names.

        Raises:
            ValueError: If a column is missing.
        """
        missing = [name for name in columns if name not in self.schema.names]
        if missing:
            raise ValueError(
                f"{self.files[0]}: expected the columns {', '.join(map(repr, missing))}, "
                f"found {', '.join(map(repr, self.schema.names))}"
            )

    def read(
        self,
        columns: Sequence[str] | None = None,
        order: Sequence[int] | None = None,
        skip: int = 0,
        rows: int = 1 << 16,
    ) -> Iterator[pa.Table]:
        """Stream the log in pieces of an exact size; memory holds one piece and the open row group's pages.

        Args:
            columns: Columns to read; all by default.
            order: Numbers of row groups, in the order to read them; all of them by default.
            skip: Rows of that order to leave out at the start; row groups before them are not opened.
            rows: Rows of a piece; the last one may be shorter.

        Yields:
            Pieces.
        """
        self.require(columns or ())
        pending: list[pa.Table] = []
        held = 0
        for piece in self._pieces(columns, order, skip, min(rows, 1 << 14)):
            pending.append(piece)
            held += piece.num_rows
            while held >= rows:
                table = pa.concat_tables(pending)
                yield table.slice(0, rows)
                pending, held = ([table.slice(rows)] if held > rows else []), held - rows
        if held:
            yield pa.concat_tables(pending)

    def _pieces(
        self, columns: Sequence[str] | None, order: Sequence[int] | None, skip: int, rows: int
    ) -> Iterator[pa.Table]:
        wanted = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        for number in range(len(self.row_groups)) if order is None else order:
            group = self.row_groups[number]
            if skip >= group.rows:
                skip -= group.rows
                continue
            path, constants = self.files[group.file], self.partitions[group.file]
            with _open(path) as file:
                names = [name for name in wanted.names if name in file.schema_arrow.names]
                try:
                    for batch in file.iter_batches(batch_size=rows, row_groups=[group.group], columns=names):
                        kept = batch.slice(skip)
                        skip = max(skip - batch.num_rows, 0)
                        if kept.num_rows:
                            yield _with_partitions(kept, wanted, constants)
                except (pa.ArrowException, OSError) as error:
                    raise ValueError(f"{path}: row group {group.group} cannot be read ({_line(error)})") from error


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_file():
        return [source]
    inside = (path for suffix in _SUFFIXES for path in source.rglob(f"*{suffix}"))
    return sorted(
        path
        for path in inside
        if path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(source).parts)
    )


def _open(path: Path) -> pq.ParquetFile:
    try:
        # pages are read as they are needed, not the compressed row group at once
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a Parquet file ({_line(error)})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _partition(path: Path, root: Path) -> dict[str, str | None]:
    if root.is_file():
        return {}
    pairs = [part.split("=", 1) for part in path.relative_to(root).parts[:-1] if "=" in part]
    return {key: None if value == _HIVE_NULL else unquote(value) for key, value in pairs}


def _typed(partitions: list[dict[str, str | None]]) -> list[dict[str, Any]]:
    """A partition column whose values are all integers becomes one of integers, as Spark infers it."""
    names = list(partitions[0])
    for partition in partitions:
        if list(partition) != names:
            raise ValueError(f"partitions: expected the folders {names} above every file, got {list(partition)}")
    integers = {
        name: all(p[name] is None or str(p[name]).removeprefix("-").isdecimal() for p in partitions) for name in names
    }
    return [{k: int(v) if integers[k] and v is not None else v for k, v in p.items()} for p in partitions]


def _common(paths: list[Path], schemas: list[pa.Schema]) -> pa.Schema:
    first = schemas[0]
    for path, schema in zip(paths, schemas, strict=True):
        if set(schema.names) != set(first.names):
            differ = sorted(set(schema.names) ^ set(first.names))
            raise ValueError(f"{path}: expected the columns of {paths[0].name}, differs in {', '.join(differ)}")
    try:
        plain = [pa.schema([_plain(field) for field in schema]) for schema in schemas]
        return pa.unify_schemas(plain, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{paths[0].parent}: files disagree on the type of a column ({_line(error)})") from error


def _plain(field: pa.Field) -> pa.Field:
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        kind = pa.large_string()
    return pa.field(field.name, kind)


def _with_partitions(batch: pa.RecordBatch, wanted: pa.Schema, constants: dict[str, Any]) -> pa.Table:
    arrays = []
    for field in wanted:
        if field.name in batch.schema.names:
            array = batch.column(field.name)
            if pa.types.is_dictionary(array.type):
                array = array.dictionary_decode()
            arrays.append(array if array.type == field.type else array.cast(field.type))
        else:
            arrays.append(pa.array([constants[field.name]] * batch.num_rows, field.type))
    return pa.Table.from_arrays(arrays, schema=wanted)
