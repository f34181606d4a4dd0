"""Files of tables: Parquet and CSV, alone or in the folders that warehouses write."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from core_tensor.app.files import reading

from polytope_lp.tables.columns import Columns, names_of

ROWS_PER_BATCH = 1 << 17
_PARTITION = re.compile(r"^([^=]+)=(.*)$")


def is_csv(file: Path) -> bool:
    """Whether a file is CSV, by its name.

    Args:
        file: The file.

    Returns:
        True for `.csv` and `.csv.gz`.
    """
    return file.name.endswith((".csv", ".csv.gz"))


def parts(path: Path) -> list[Path]:
    """The files of a table: Spark and other warehouses write a folder of them.

    Args:
        path: A file, or a folder.

    Returns:
        The file, or the folder's Parquet files in order, those with hidden names left out.
    """
    if not path.is_dir():
        return [path]
    inside = sorted(path.rglob("*.parquet"))
    return [f for f in inside if not any(p.startswith((".", "_")) for p in f.relative_to(path).parts)]


@dataclass(frozen=True, eq=False)
class EdgeFile:
    """A file of edges that is read in batches.

    Attributes:
        file: The file.
        rows: Number of rows.
        schema: Columns, those that its folders name included.
        folders: Values of the columns that its folders name, as in `date=2026-01-31/`.
        table: The rows of a CSV file; None where batches come from Parquet.
    """

    file: Path
    rows: int
    schema: pa.Schema
    folders: dict[str, str]
    table: pa.Table | None

    @classmethod
    def open(cls, file: Path, columns: Columns) -> "EdgeFile":
        """Read what the file says of itself.

        Args:
            file: Parquet or CSV.
            columns: Names of the columns.

        Returns:
            The file.
        """
        if is_csv(file):
            table = read_table(file, columns)
            return cls(file, table.num_rows, table.schema, {}, table)
        with reading(file, "a Parquet file"):
            found = pq.ParquetFile(file)
            schema, rows = found.schema_arrow, found.metadata.num_rows
        named = [_PARTITION.match(part) for part in file.parent.parts]
        folders = {m[1]: m[2] for m in named if m is not None and m[1] not in schema.names}
        for name in folders:
            schema = schema.append(pa.field(name, pa.large_string()))
        return cls(file, rows, schema, folders, None)

    def check(self, columns: Columns, first: pa.Schema) -> None:
        """Refuse a file without the columns that every edge needs, or with others than the first file has.

        Args:
            columns: Names of the columns.
            first: Columns of the first file.

        Raises:
            ValueError: If a column is absent, superfluous, or there are several of its name.
        """
        needed = (columns.source, *names_of(columns.destination), columns.value)
        optional = (*names_of(columns.cost), columns.upper, columns.weight)
        for name in (*needed, *optional):
            wanted, found = name in needed or name in first.names, self.schema.names.count(name)
            if found != wanted:
                expected = "a column" if wanted and not found else "one column" if wanted else "no column"
                raise ValueError(f"{self.file}: expected {expected} {name!r}, got {', '.join(self.schema.names)}")

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows.

        Yields:
            Batches with the columns of the schema.
        """
        if self.table is not None:
            yield from self.table.to_batches(ROWS_PER_BATCH)
            return
        with reading(self.file, "a Parquet file"):
            stream = pq.ParquetFile(self.file).iter_batches(batch_size=ROWS_PER_BATCH)
        while True:
            with reading(self.file, "a Parquet file"):
                batch = next(stream, None)
            if batch is None:
                return
            for name, value in self.folders.items():
                batch = batch.append_column(name, pa.array([value] * batch.num_rows, pa.large_string()))
            yield batch


def read_table(file: Path, columns: Columns | None = None) -> pa.Table:
    """Read a Parquet or CSV file, or a folder of Parquet files.

    Args:
        file: The file or folder.
        columns: Names of the columns, of which those that hold keys are text in a CSV file; the usual ones if None.

    Returns:
        The table.

    Raises:
        ValueError: If it is missing or unreadable.
    """
    if not file.exists():
        raise ValueError(f"{file}: no such file")
    if file.is_dir():
        return _read_folder(file)
    if is_csv(file):
        names = columns or Columns()
        text: dict[str, Any] = {n: pa.large_string() for n in (names.source, *names_of(names.destination))}
        options = pyarrow.csv.ConvertOptions(column_types=text, strings_can_be_null=True)
        with reading(file, "a CSV file"):
            return pyarrow.csv.read_csv(file, convert_options=options)
    with reading(file, "a Parquet file"):
        return pq.ParquetFile(file).read()


def _read_folder(folder: Path) -> pa.Table:
    tables = [read_table(file) for file in parts(folder)]
    if not tables:
        raise ValueError(f"{folder}: expected a folder of Parquet files, found none")
    with reading(folder, "a folder of tables with the same columns"):
        if any(set(table.column_names) != set(tables[0].column_names) for table in tables):
            raise ValueError("columns differ from file to file")
        return pa.concat_tables(tables, promote_options="permissive")
