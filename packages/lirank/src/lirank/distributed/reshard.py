"""Shards of tables on disk, written by any number of ranks and read by any other number.

A folder holds one safetensors file per rank that wrote, with its run of rows of every tensor, and an index, which is
written last: a kill leaves the old state or the new one. Departure from `torch.distributed.checkpoint`: its index is a
pickle, and a pickle is a program.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from core_tensor.app.files import atomic_path, read_json, reading, write_json
from core_tensor.app.ranks import Ranks
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lirank.distributed.exchange import owned

INDEX = "shards.json"


def write_shards(
    folder: str | os.PathLike[str], stem: str, tensors: Mapping[str, Tensor], rows: int, ranks: Ranks
) -> dict[str, Any]:
    """Write what every rank owns; all ranks have to call. The files count once the index is part of something saved.

    Args:
        folder: Where to.
        stem: Beginning of the files' names, different from those of what is saved already.
        tensors: This rank's rows of every tensor (table, moments), shape (rows of this rank, ...).
        rows: Rows of all ranks.
        ranks: The ranks.

    Returns:
        The index: `rows` and `files`, for `read_shards`.

    Raises:
        ValueError: If a tensor does not have the rows that this rank owns.
    """
    folder = Path(folder)
    start, stop = owned(ranks.rank, ranks.size, rows)
    for name, tensor in tensors.items():
        if len(tensor) != stop - start:
            raise ValueError(f"{name}: expected the rows {start} to {stop} of this rank, got {len(tensor)} rows")
    name = f"{stem}-{ranks.rank:05d}-of-{ranks.size:05d}.safetensors"
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic_path(folder / name) as temporary:
        save_file(plain, temporary, {"rows": json.dumps([start, stop])})
    return {"rows": rows, "files": ranks.gather(name)}


def save_shards(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], rows: int, ranks: Ranks) -> None:
    """Write what every rank owns, and an index; all ranks have to call.

    Args:
        folder: Where to.
        tensors: This rank's rows of every tensor (table, moments), shape (rows of this rank, ...).
        rows: Rows of all ranks.
        ranks: The ranks.

    Raises:
        ValueError: If a tensor does not have the rows that this rank owns.
    """
    folder = Path(folder)
    old = _files(read_json(folder / INDEX)) if (folder / INDEX).exists() else []
    generation = ranks.share(1 + max((int(name.split("-")[1]) for name in old), default=0))
    index = write_shards(folder, f"shard-{generation:06d}", tensors, rows, ranks)
    if ranks.first:
        write_json(folder / INDEX, index)
    ranks.barrier()
    if ranks.first:  # the index no longer names them
        sweep_shards(folder, old, index["files"])


def sweep_shards(folder: Path, old: list[str], kept: list[str]) -> None:
    """Remove shards that nothing names any longer."""
    for stale in set(old) - set(kept):
        (folder / stale).unlink(missing_ok=True)


def load_shards(folder: str | os.PathLike[str], rows: int, ranks: Ranks) -> dict[str, Tensor]:
    """Read this rank's rows, however many ranks wrote.

    Args:
        folder: What `save_shards` wrote.
        rows: Rows of all ranks.
        ranks: The ranks that read.

    Returns:
        This rank's rows of every tensor.

    Raises:
        ValueError: If the folder is broken or holds another number of rows.
    """
    folder = Path(folder)
    with reading(folder / INDEX, "the index of a sharded table"):
        index = read_json(folder / INDEX)
        _files(index)
        if index["rows"] != rows:
            raise ValueError(f"it holds {index['rows']} rows, the table has {rows}")
    return read_shards(folder, index, rows, ranks)


def read_shards(folder: str | os.PathLike[str], index: Mapping[str, Any], rows: int, ranks: Ranks) -> dict[str, Tensor]:
    """Read this rank's rows, however many ranks wrote.

    Args:
        folder: Where the shards are.
        index: What `write_shards` returned.
        rows: Rows of all ranks.
        ranks: The ranks that read.

    Returns:
        This rank's rows of every tensor.

    Raises:
        ValueError: If a shard is missing or broken, or they hold another number of rows.
    """
    folder = Path(folder)
    start, stop = owned(ranks.rank, ranks.size, rows)
    pieces: dict[str, list[Tensor]] = {}
    at = 0
    for name in _files(index):
        with reading(folder / name, "a shard of a table"), safe_open(folder / name, "pt") as file:
            first, last = json.loads((file.metadata() or {})["rows"])
            if first != at or not first <= last <= rows:
                raise ValueError(f"it holds the rows {first} to {last}, expected ones from {at}")
            at = last
            for key in sorted(file.keys()):
                part = file.get_slice(key)
                if part.get_shape()[0] != last - first:
                    raise ValueError(f"{key} has {part.get_shape()[0]} rows, not {last - first}")
                low, high = max(start, first), min(stop, last)
                pieces.setdefault(key, []).append(part[max(low - first, 0) : max(high - first, 0)])
    if at != rows or len({len(parts) for parts in pieces.values()}) > 1:
        raise ValueError(f"{folder}: expected {rows} rows of every tensor in its shards, found {at}")
    return {key: torch.cat(parts) for key, parts in pieces.items()}


def _files(index: Any) -> list[str]:
    """The names in an index; none leads out of the folder."""
    names = index["files"]
    if not isinstance(names, list) or not all(isinstance(n, str) and n == Path(n).name for n in names):
        raise ValueError("expected a list of file names")
    return names
