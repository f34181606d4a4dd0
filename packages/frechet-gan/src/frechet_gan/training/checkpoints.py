"""Read the files that trainers write, without unpickling code."""

import os
from typing import Any

import torch
from torch import nn

from frechet_gan.training.networks import NetworkConfig


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of `FrechetTrainer.save` (no code is unpickled).

    Args:
        path: File name.

    Returns:
        Its parts by name.

    Raises:
        ValueError: If it is no such checkpoint.
        FileNotFoundError: If there is no such file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many types for foreign files
        raise ValueError(f"{path}: expected a checkpoint of frechet-gan ({type(error).__name__})") from error
    if not isinstance(state, dict) or not {"network", "config", "generator"} <= state.keys():
        raise ValueError(f"{path}: expected a checkpoint of frechet-gan with network, config and generator")
    return state


def load_generator(path: str | os.PathLike[str]) -> tuple[nn.Module, NetworkConfig]:
    """The generator of a checkpoint: the averaged one, if there is one.

    Args:
        path: File name.

    Returns:
        Generator in evaluation mode and the description of its networks.

    Raises:
        ValueError: If it is no checkpoint, or one of networks that are not described in it.
    """
    state = read_checkpoint(path)
    if state["network"] is None:
        raise ValueError(
            f"{path}: expected a checkpoint of networks from a NetworkConfig; for your own networks load "
            "read_checkpoint(path)['generator'] (or ['average']) into your generator"
        )
    network = NetworkConfig(**state["network"])
    generator = network.build().generator
    generator.load_state_dict(state["average"] or state["generator"])
    return generator.eval(), network
