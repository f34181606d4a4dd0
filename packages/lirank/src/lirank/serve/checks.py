"""Checks before a runtime: onnxruntime scores id -1 as the last row, and NaN as NaN, without a word."""

from collections.abc import Mapping

import numpy as np

from lirank.schema.features import Dense, History
from lirank.schema.layout import Layout

Feeds = Mapping[str, np.ndarray]


def check_feeds(layout: Layout, feeds: Feeds) -> None:
    """Refuse inputs that the exported model must not see.

    Args:
        layout: Positions that follow from the schema.
        feeds: Inputs by name: `ids`, `dense`, and for each list its rows, `.lengths` and `.action`.

    Raises:
        ValueError: If an id is outside its feature's rows, a number is infinite, or NaN where it may not be missing, or
            a length does not fit.
    """
    _check_shapes(layout, feeds)
    ids = feeds["ids"]
    for j, (start, end) in enumerate(layout.ranges):
        bad = (ids[:, j] < start) | (ids[:, j] >= end)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(f"ids: row {row}, column {j}: expected [{start}, {end}), got {ids[row, j]}")
    may_miss = {f.name for f in layout.schema.of(Dense) if f.missing == "mean"}
    for j, name in enumerate(layout.dense):
        values = feeds["dense"][:, j]
        bad = np.isinf(values) | (np.isnan(values) & (name not in may_miss))
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(f"dense: row {row}, {name}: expected a finite number, got {values[row]}")
    for feature in (*layout.bags, *layout.sequences):
        rows, lengths = feeds[feature.name], feeds[f"{feature.name}.lengths"]
        if ((lengths < 0) | (lengths > rows.shape[1])).any():
            raise ValueError(f"{feature.name}.lengths: expected values in [0, {rows.shape[1]}]")
        start, end = layout.span(feature.name)
        if ((rows < start) | (rows >= end)).any():
            raise ValueError(f"{feature.name}: expected rows in [{start}, {end})")
        if isinstance(feature, History) and feature.action:
            action = feeds[f"{feature.name}.action"]
            if action.shape != rows.shape or ((action < 0) | (action > 2)).any():
                raise ValueError(f"{feature.name}.action: expected 0, 1 or 2 for every item")


def _check_shapes(layout: Layout, feeds: Feeds) -> None:
    missing = [name for name in input_names(layout) if name not in feeds]
    if missing:
        raise ValueError(f"inputs: expected {', '.join(input_names(layout))}; {', '.join(missing)} missing")
    n = len(feeds["ids"])
    for name, width in (("ids", len(layout.ranges)), ("dense", len(layout.dense))):
        if feeds[name].shape != (n, width):
            raise ValueError(f"{name}: expected shape ({n}, {width}), got {feeds[name].shape}")
    for name in input_names(layout):
        if len(feeds[name]) != n:
            raise ValueError(f"{name}: expected {n} rows, got {len(feeds[name])}")


def input_names(layout: Layout) -> list[str]:
    """Names of the exported model's inputs, in order."""
    names = ["ids", "dense"]
    for feature in (*layout.bags, *layout.sequences):
        names += [feature.name, f"{feature.name}.lengths"]
        if isinstance(feature, History) and feature.action:
            names.append(f"{feature.name}.action")
    return names
