"""Where a model's tensors come from: a folder of safetensors read lazily, or a model that is already in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from core_tensor.app.files import read_json
from safetensors import safe_open
from torch import Tensor, nn


class WeightSource(Protocol):
    """Tensors by the names of the model's `state_dict`."""

    def has(self, name: str) -> bool:
        """Whether there is such a tensor.

        Args:
            name: Name in the model's `state_dict`.
        """

    def load(self, name: str) -> Tensor:
        """A copy of one tensor on the CPU, in its stored dtype.

        Args:
            name: Name in the model's `state_dict`.
        """


class ModuleWeights:
    """Tensors of a model in memory, which is left untouched.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = model.state_dict(keep_vars=False)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor.

        Args:
            name: Name in the model's `state_dict`.

        Returns:
            True or false.
        """
        return name in self._tensors

    def load(self, name: str) -> Tensor:
        """A copy of one tensor on the CPU.

        Args:
            name: Name in the model's `state_dict`.

        Returns:
            The tensor.
        """
        return self._tensors[name].detach().to("cpu", copy=True)


class SafetensorsWeights:
    """Tensors of a folder with `model.safetensors` or an index of shards; each is read when it is asked for.

    Args:
        folder: The checkpoint.
        prefix: The model's `base_model_prefix`, which older checkpoints leave out of their names.

    Raises:
        ValueError: If the folder has no safetensors, or a file is truncated or foreign.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._files: Mapping[str, str] = read_json(index)["weight_map"]
        elif (folder / "model.safetensors").exists():
            names = _open(folder / "model.safetensors").keys()
            self._files = dict.fromkeys(names, "model.safetensors")
        else:
            raise ValueError(f"{folder}: expected model.safetensors or model.safetensors.index.json, found neither")
        missing = sorted({file for file in self._files.values() if not (folder / file).exists()})
        if missing:
            raise ValueError(f"{folder}: expected the shards {', '.join(missing)}, which the index names")
        self._folder, self._prefix = folder, prefix

    def _stored(self, name: str) -> str | None:
        bare = name.removeprefix(f"{self._prefix}.")
        return next((key for key in (name, bare, f"{self._prefix}.{name}") if key in self._files), None)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor.

        Args:
            name: Name in the model's `state_dict`.

        Returns:
            True or false.
        """
        return self._stored(name) is not None

    def load(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: Name in the model's `state_dict`.

        Returns:
            The tensor on the CPU, in its stored dtype.

        Raises:
            KeyError: If there is none.
        """
        key = self._stored(name)
        if key is None:
            raise KeyError(name)
        with _open(self._folder / self._files[key]) as file:
            # A clone, because the tensor is a window of the mapped file, whose pages would stay resident with it.
            return file.get_tensor(key).clone()  # type: ignore[no-any-return]


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except Exception as error:  # safetensors raises its own error type, which it does not export everywhere
        raise ValueError(f"{path}: expected a whole safetensors file ({error})") from error


def assign(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Replace a parameter or buffer; None puts it back on the meta device.

    Args:
        module: Root of the name.
        name: Dotted name.
        value: New values, of the same shape.

    Raises:
        ValueError: If the shape differs.
    """
    owner_name, _, key = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    is_parameter = key in owner._parameters
    old = owner._parameters[key] if is_parameter else owner._buffers[key]
    if old is None:
        raise ValueError(f"{name}: expected a tensor of the model, got none")
    if value is not None and value.shape != old.shape:
        raise ValueError(f"{name}: expected shape {tuple(old.shape)}, got {tuple(value.shape)} in the checkpoint")
    new = torch.empty_like(old, device="meta") if value is None else value
    if is_parameter:
        owner._parameters[key] = nn.Parameter(new, requires_grad=False)
    else:
        owner._buffers[key] = new


def metadata(path: Path) -> dict[str, Any]:
    """The JSON that a safetensors file of ours carries in its header.

    Args:
        path: The file.

    Returns:
        Its values.

    Raises:
        ValueError: If it is not such a file.
    """
    with _open(path) as file:
        values = (file.metadata() or {}).get("quantease")
    if values is None:
        raise ValueError(f"{path}: expected a file that quantease wrote")
    parsed: dict[str, Any] = json.loads(values)
    return parsed
