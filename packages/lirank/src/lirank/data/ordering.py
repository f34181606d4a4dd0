"""A log in the order of event time, in bounded memory: runs sorted one by one on disk, then merged."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lirank.data.parquet import Rows
from lirank.schema.columns import as_times, column_of


def in_time_order(
    log: Rows, columns: list[str], time: str, scratch: str | Path, run_rows: int = 1 << 20, rows: int = 1 << 16
) -> Iterator[pa.Table]:
    """Stream a log by event time; rows of equal time keep the log's order.

    Args:
        log: The log.
        columns: Columns to read, with that of the time.
        time: Column of the time.
        scratch: Folder for temporary files.
        run_rows: Rows that are sorted in memory.
        rows: About how many rows a piece has.

    Yields:
        Pieces; no time of one is before a time of the piece before it.
    """
    with tempfile.TemporaryDirectory(prefix=".sort-", dir=scratch) as folder:
        runs: list[Path] = []
        single = None
        for number, table in enumerate(log.read(columns, rows=run_rows)):
            times = as_times(time, column_of(table, time))
            ordered = table.take(np.argsort(times, kind="stable")) if (np.diff(times) < 0).any() else table
            if number == 0 and table.num_rows < run_rows:
                single = ordered
                break
            runs.append(Path(folder) / f"{number}.parquet")
            pq.write_table(ordered, runs[-1], row_group_size=max(rows // 8, 1), compression="lz4")
        if single is not None:
            for start in range(0, single.num_rows, rows):
                yield single.slice(start, rows)
        else:
            yield from _merge([_Run(path, time) for path in runs])


class _Run:
    """The rows of a sorted run that are not merged yet: `table` in memory, more behind it."""

    def __init__(self, path: Path, time: str) -> None:
        self._file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 18)
        self._group = 0
        self.time = time
        self.table: pa.Table | None = None
        self.times = np.zeros(0, np.int64)
        self.more = True
        self.fill()

    def fill(self) -> None:
        """Bring in the next piece."""
        if self._group == self._file.num_row_groups:
            self.more = False
            return
        piece = self._file.read_row_group(self._group)
        self._group += 1
        self.table = piece if self.table is None else pa.concat_tables([self.table, piece])
        self.times = as_times(self.time, column_of(self.table, self.time))

    def take_until(self, time: int) -> pa.Table | None:
        """Remove and return the rows at or before a time."""
        end = int(np.searchsorted(self.times, time, side="right"))
        if end == 0 or self.table is None:
            return None
        taken, self.table, self.times = self.table.slice(0, end), self.table.slice(end), self.times[end:]
        return taken


def _merge(runs: list[_Run]) -> Iterator[pa.Table]:
    while True:
        for run in runs:
            while run.more and len(run.times) == 0:
                run.fill()
        open_ends = [int(run.times[-1]) for run in runs if run.more]
        ends = open_ends or [int(run.times[-1]) for run in runs if len(run.times)]
        if not ends:
            return
        # rows before the least last time in memory are complete; those at it may continue in that run's next piece
        limit = min(open_ends) - 1 if open_ends else max(ends)
        taken = [piece for run in runs if (piece := run.take_until(limit)) is not None]
        if taken:
            table = pa.concat_tables(taken)
            times = np.concatenate([as_times(runs[0].time, column_of(piece, runs[0].time)) for piece in taken])
            yield table.take(np.argsort(times, kind="stable"))
        else:  # one time fills a piece: bring in more of the runs that end there
            for run in runs:
                if run.more and int(run.times[-1]) == limit + 1:
                    run.fill()


@contextlib.contextmanager
def closed_early(pieces: Iterator[pa.Table]) -> Iterator[Iterator[pa.Table]]:
    """Read pieces, and clean up behind them also where the reader stops early.

    Args:
        pieces: What `in_time_order` or a log gives.

    Yields:
        The same.
    """
    try:
        yield pieces
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()
