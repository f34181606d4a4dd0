"""The order in which training sees a log: shuffled, the same every time, and enterable at any batch.

Row groups are permuted per epoch; rows are then permuted within windows of a fixed number of rows of that order. So a
position is (epoch, number of batches), and resuming opens the row group where its window begins. Memory holds one
window, also where a file is one huge row group; there rows are shuffled within windows only, so write row groups well
below the window.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lirank.data.parquet import ParquetLog


@dataclass(frozen=True)
class Window:
    """Consecutive rows of an epoch's order.

    Attributes:
        table: The rows, as read.
        order: How to permute them, shape (rows,).
        first: Number of the first batch in it.
        start: Batches of it to leave out, when resuming.
    """

    table: pa.Table
    order: np.ndarray
    first: int
    start: int


def windows(
    log: ParquetLog,
    columns: list[str] | None,
    batch_size: int,
    epoch: int,
    seed: int | None,
    start: int = 0,
    window_batches: int = 32,
) -> Iterator[Window]:
    """The windows of one epoch.

    Args:
        log: The log.
        columns: Columns to read.
        batch_size: Rows of a batch.
        epoch: Number of the epoch.
        seed: Seed of the shuffle; None keeps the log's order.
        start: Number of the first batch wanted.
        window_batches: Batches of a window.

    Yields:
        Windows, from the one that holds batch `start`.
    """
    order = np.arange(len(log.row_groups))
    if seed is not None:
        np.random.default_rng([seed, epoch]).shuffle(order)
    size = batch_size * window_batches
    number = start // window_batches
    for table in log.read(columns, order.tolist(), skip=number * size, rows=size):
        inside = np.arange(table.num_rows)
        if seed is not None:
            np.random.default_rng([seed, epoch, number]).shuffle(inside)
        yield Window(table, inside, number * window_batches, max(start - number * window_batches, 0))
        number += 1
