"""Weights from a local file: what torch or safetensors wrote, never code."""

import os
from pathlib import Path

import torch
from core_tensor.app.extras import require
from core_tensor.app.files import reading
from torch import Tensor, nn

_IGNORED = ("num_batches_tracked",)  # a counter that evaluation never reads and old files lack


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name.

    Args:
        path: File of `torch.save` (.pth, .pt, .bin) or safetensors.

    Returns:
        The state dictionary, also where it is the entry `state_dict` or `model` of a training checkpoint.

    Raises:
        ValueError: If the file holds something else; TorchScript archives, which run code, are refused.
        FileNotFoundError: If there is no such file.
    """
    if Path(path).suffix == ".safetensors":
        with reading(path, "weights in safetensors"):
            loaded = require("safetensors.torch", "safetensors").load(Path(path).read_bytes())
    else:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch raises many types for foreign files
            why = type(error).__name__
            if "TorchScript" in str(error):
                why = "TorchScript archives run code; if you trust it: torch.save(torch.jit.load(IT).state_dict(), NEW)"
            raise ValueError(f"{path}: expected a state dictionary ({why})") from error
    for entry in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(entry), dict):
            loaded = loaded[entry]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()) or not loaded:
        raise ValueError(f"{path}: expected a state dictionary of tensors")
    for name, value in loaded.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: expected finite weights, got NaN or infinity in {name}")
    return {str(name): value for name, value in loaded.items()}


def fill(network: nn.Module, weights: dict[str, Tensor], path: str | os.PathLike[str], what: str) -> None:
    """Load weights into a network whose every parameter and buffer they must name, in its shapes.

    Args:
        network: The network.
        weights: Tensors by name.
        path: Their file, for messages.
        what: What the network is, for messages.

    Raises:
        ValueError: If names are missing or unknown, or shapes differ.
    """
    own = network.state_dict()
    missing = [n for n in own if n not in weights and not n.endswith(_IGNORED)]
    unknown = [n for n in weights if n not in own]
    if missing or unknown:
        first = f"no {missing[0]}" if missing else f"unknown {unknown[0]}"
        raise ValueError(
            f"{path}: expected the weights of {what}, found {first} (and {len(missing + unknown) - 1} more)"
        )
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{path}: expected {name} of {what} with shape {tuple(own[name].shape)}, got {tuple(value.shape)}"
            )
    network.load_state_dict({n: v.to(own[n].dtype) for n, v in weights.items()}, strict=False)
