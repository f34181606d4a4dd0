"""Checkpoints: one safetensors file with every tensor and a JSON record, complete or absent, and never a pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core_tensor.app.files import atomic_path, reading
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


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
