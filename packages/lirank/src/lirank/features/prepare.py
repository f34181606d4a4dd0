"""One pass over a log in time order: causal features, split, and what the schema learns from the training part.

The result is a folder of Parquet files of small row groups, which training then reads as often as it likes, the state
of the encoder, and what the causal features remember at the end of the log, from which serving continues.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from core_tensor.app.files import atomic_path, read_json, reading, write_json
from safetensors import safe_open
from safetensors.numpy import save_file

from lirank.data.batch import Encoder
from lirank.data.growth import grown_encoder
from lirank.data.ordering import closed_early, in_time_order
from lirank.data.parquet import ParquetLog
from lirank.data.split import PARTS, TRAIN, Split, Splitter
from lirank.features.causal import CausalFeatures
from lirank.features.delayed import settle, stretch
from lirank.schema.columns import as_times, column_of, seconds_per_unit
from lirank.schema.features import Schema, parse_schema

ROW_GROUP = 8192
_FILE_ROWS = 1 << 20


@dataclass(frozen=True)
class Prepared:
    """A prepared folder.

    Attributes:
        folder: Its folder.
        rows: Rows of each part.
        notes: What the schema's author should know, one line each.
        until: Time of the last row, in the log's unit; None in a log without times.
    """

    folder: Path
    rows: dict[str, int]
    notes: list[str]
    until: int | None = None

    def log(self, part: str) -> ParquetLog | None:
        """The rows of a part; None if it has none."""
        return ParquetLog.open(self.folder / part) if self.rows[part] else None

    def encoder(self) -> Encoder:
        """What the schema learned."""
        return load_encoder(self.folder / "encoder.safetensors")

    def causal(self) -> CausalFeatures:
        """What the causal features remember at the end of the log."""
        return load_causal(self.folder / "causal.safetensors")


@dataclass(frozen=True)
class Earlier:
    """What an earlier training hands to the next.

    Attributes:
        encoder: Its vocabularies and statistics.
        causal: Its causal memory.
        until: Time up to which it has consumed its log; None in a log without times.
    """

    encoder: Encoder
    causal: CausalFeatures
    until: int | None


def prepare(
    log: ParquetLog,
    schema: Schema,
    split: Split,
    folder: Path,
    report: Callable[[int], None] | None = None,
    *,
    earlier: Earlier | None = None,
    now: int | None = None,
) -> Prepared:
    """Prepare a log for training; a folder that is complete is taken as it is.

    Args:
        log: The log.
        schema: The schema.
        split: How to divide it.
        folder: Where the result goes.
        report: Called with the number of rows that were done.
        earlier: A training to go on from: its rows are left out, and what it learned grows.
        now: Time of the log's export, for labels that arrive later; None takes the latest time in it.

    Returns:
        The prepared folder.

    Raises:
        ValueError: If the log and the schema disagree, or the training part is empty.
    """
    marker = folder / "prepared.json"
    if marker.exists():
        found = read_json(marker)
        return Prepared(folder, found["rows"], found["notes"], found["until"])
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it prepared
    folder.mkdir(parents=True)
    log.require(schema.columns())
    seconds = _seconds(log, schema)
    if earlier is not None and earlier.causal.seconds != seconds:
        raise ValueError(f"time: expected the earlier run's unit of {earlier.causal.seconds:g} s, got {seconds:g} s")
    encoder = grown_encoder(earlier.encoder, schema) if earlier else Encoder(schema)
    causal = earlier.causal.grown(schema) if earlier else CausalFeatures(schema, seconds)
    rows_of = stretch(log, schema, earlier.until if earlier else None, now)
    consumed, waiting = rows_of.left_out()
    if consumed + waiting == log.rows:
        raise ValueError(
            f"{log.files[0].parent}: no row to train on: {consumed} were consumed by the earlier run, {waiting} wait "
            "for their labels"
        )
    splitter = Splitter(rows_of, schema, split)
    writers = {part: _Writer(folder / part) for part in PARTS}
    columns = schema.columns()
    pieces = in_time_order(rows_of, columns, schema.time.column, folder) if schema.time else log.read(columns)
    until = None
    with closed_early(pieces):  # a row that is refused leaves no sorted copy behind
        for piece in pieces:
            part = splitter.assign(piece)
            table = causal.extend(settle(piece, schema, seconds, rows_of.now))
            if schema.time:
                until = int(as_times(schema.time.column, column_of(piece, schema.time.column)).max())
            encoder.encode(table)  # what is refused is refused before anything is learned from it
            for number, name in enumerate(PARTS):
                rows = table.filter(pa.array(part == number))
                if number == TRAIN and rows.num_rows:
                    encoder.observe(rows)
                writers[name].write(rows)
            if report is not None:
                report(piece.num_rows)
    rows = {name: writer.close() for name, writer in writers.items()}
    if rows["train"] == 0:
        raise ValueError("split: expected training rows, got none")
    save_encoder(encoder, folder / "encoder.safetensors")
    save_causal(causal, folder / "causal.safetensors")
    until = rows_of.until if rows_of.until is not None else until
    notes = encoder.check_columns()
    notes += [f"{consumed} rows were consumed by the earlier run"] if consumed else []
    notes += [f"{waiting} rows wait for their labels: train again from this run when they are there"] if waiting else []
    write_json(marker, {"rows": rows, "notes": notes, "until": until})
    return Prepared(folder, rows, notes, until)


def _seconds(log: ParquetLog, schema: Schema) -> float:
    if schema.time is None:
        return 1.0
    return seconds_per_unit(log.schema.field(schema.time.column).type, schema.time.unit)


class _Writer:
    """Parquet files of row groups of one size."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._rows, self._held, self._file = folder, 0, 0, 0
        self._pending: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        if table.num_rows == 0:
            return
        self._pending.append(table)
        self._held += table.num_rows
        if self._held >= 8 * ROW_GROUP:
            whole = pa.concat_tables(self._pending)
            self._flush(whole.slice(0, self._held // ROW_GROUP * ROW_GROUP))
            rest = whole.slice(self._held // ROW_GROUP * ROW_GROUP)
            self._pending, self._held = ([rest] if rest.num_rows else []), rest.num_rows

    def _flush(self, table: pa.Table) -> None:
        if self._writer is None:
            self._folder.mkdir(exist_ok=True)
            path = self._folder / f"part-{self._file:05d}.parquet"
            self._writer = pq.ParquetWriter(path, table.schema, compression="zstd", compression_level=1)
        self._writer.write_table(table, row_group_size=ROW_GROUP)
        self._rows += table.num_rows
        if self._rows >= (self._file + 1) * _FILE_ROWS:
            self._writer.close()
            self._writer, self._file = None, self._file + 1

    def close(self) -> int:
        """Finish; returns the rows written."""
        if self._pending:
            self._flush(pa.concat_tables(self._pending))
        if self._writer is not None:
            self._writer.close()
        return self._rows


# ----------------------------------------------------------------------------------------------------------------------


def save_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Write arrays and JSON metadata as one safetensors file."""
    with atomic_path(path) as temporary:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, {"lirank": json.dumps(metadata)})


def load_arrays(path: Path, expected: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_arrays` wrote."""
    with reading(path, expected), safe_open(path, "np") as file:
        metadata = json.loads((file.metadata() or {})["lirank"])
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def save_encoder(encoder: Encoder, path: Path) -> None:
    """Write what a schema learned, with the schema."""
    save_arrays(path, encoder.state(), {"schema": encoder.schema.to_yaml()})


def load_encoder(path: Path) -> Encoder:
    """Read what `save_encoder` wrote."""
    arrays, metadata = load_arrays(path, "the encoder of a lirank run")
    with reading(path, "the encoder of a lirank run"):
        encoder = Encoder(parse_schema(metadata["schema"]))
        encoder.load_state(arrays)
    return encoder


def save_causal(causal: CausalFeatures, path: Path) -> None:
    """Write what causal features remember, with the schema."""
    metadata = {"schema": causal.schema.to_yaml(), "seconds": causal.seconds}
    save_arrays(path, causal.state(), metadata)


def load_causal(path: Path) -> CausalFeatures:
    """Read what `save_causal` wrote."""
    arrays, metadata = load_arrays(path, "the causal state of a lirank run")
    with reading(path, "the causal state of a lirank run"):
        causal = CausalFeatures(parse_schema(metadata["schema"]), float(metadata["seconds"]))
        causal.load_state(arrays)
    return causal
