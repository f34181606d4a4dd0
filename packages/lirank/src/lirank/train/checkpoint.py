"""Checkpoints: one safetensors file with every tensor and a JSON record, complete or absent, and never a pickle."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_tensor.app.files import atomic_path, reading
from core_tensor.app.ranks import Ranks
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lirank.distributed.reshard import read_shards, write_shards


def save(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a record.

    Args:
        path: The file.
        tensors: Tensors by name.
        record: Anything JSON holds; one entry of the header, so that equal contents give equal bytes.
    """
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, {"lirank": json.dumps(record, sort_keys=True)})


def load(path: Path, expected: str = "a lirank checkpoint") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote.

    Args:
        path: The file.
        expected: What it should be, for the message.

    Returns:
        Tensors and record.

    Raises:
        ValueError: If the file is broken or something else.
    """
    with reading(path, expected), safe_open(path, "pt") as file:
        record = json.loads((file.metadata() or {})["lirank"])
        return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118


@dataclass(frozen=True)
class Shape:
    """How a table is shared out.

    Attributes:
        rows: Rows of the whole table.
        start: First row of this process.
        length: Rows of this process.
        ranks: The processes.
    """

    rows: int
    start: int
    length: int
    ranks: Ranks

    @property
    def sharded(self) -> bool:
        """Whether every process has its own rows."""
        return self.ranks.size > 1 and self.length < self.rows


def save_shared(
    path: Path, tensors: Mapping[str, Tensor], rows: Mapping[str, Tensor], record: Mapping[str, Any], shape: Shape
) -> None:
    """Write what all processes have, and the rows of each; all of them have to call.

    The file of rank 0 names the shards, so that a kill leaves the old checkpoint or the new one, never parts of both.

    Args:
        path: The file.
        tensors: Tensors by name, the same on all processes but for the sharded ones.
        rows: Those whose rows are shared out; empty for a table that every process has.
        record: Anything JSON holds.
        shape: How the table is shared out.
    """
    before = _shards_of(path) if shape.ranks.first and path.exists() else []
    if rows:
        number = shape.ranks.share(1 + max((int(name.split("-")[1]) for name in before), default=0))
        index = write_shards(path.parent, f"{path.stem}-{number:06d}", rows, shape.rows, shape.ranks)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in rows}
        record = {**record, "shards": index}
    if shape.ranks.first:
        save(path, tensors, record)
        for stale in set(before) - set(_files(record)):
            (path.parent / stale).unlink(missing_ok=True)
    shape.ranks.barrier()


def load_shared(path: Path, shape: Shape) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_shared` wrote, however many processes wrote it.

    Args:
        path: The file.
        shape: How the table is shared out now.

    Returns:
        Tensors, of shared tables this process's rows, and the record.
    """
    tensors, record = load(path)
    if "shards" in record:
        return tensors | read_shards(path.parent, record["shards"], shape.rows, _reader(shape)), record
    if shape.sharded:  # a single process wrote it
        own = slice(shape.start, shape.start + shape.length)
        tensors = {k: v[own] if "rows." in k or k.endswith("table.weight") else v for k, v in tensors.items()}
    return tensors, record


def _reader(shape: Shape) -> Ranks:
    return shape.ranks if shape.sharded else Ranks()


def _files(record: Mapping[str, Any]) -> list[str]:
    found: list[str] = record["shards"]["files"] if "shards" in record else []
    return found


def _shards_of(path: Path) -> list[str]:
    """Shards that an earlier checkpoint names."""
    with safe_open(path, "pt") as file:
        return _files(json.loads((file.metadata() or {})["lirank"]))


def check_names(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another schema or another model.

    Args:
        path: The file, for the message.
        found: What it holds.
        wanted: What the model holds.

    Raises:
        ValueError: If names or shapes differ.
    """
    for name in sorted(set(found) ^ set(wanted)):
        raise ValueError(f"{path}: {name} is {'missing' if name in wanted else 'unknown'}: it is of another model")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, the model {tuple(tensor.shape)}: it is of "
                "another schema or model"
            )
