"""The state that the trainers save: written atomically, read without unpickling code, refused where it does not fit."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from core_tensor.app.files import reading, write_buffered
from torch import nn

from frechet_gan.training.networks import NetworkConfig, build_generator

_COUNTERS = {"step_count": int, "cpu_seconds": float}


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a checkpoint, atomically.

    Args:
        path: File name.
        state: Its parts by name: tensors, numbers, strings and containers of them.
    """
    write_buffered(path, lambda file: torch.save(dict(state), file))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of `FrechetTrainer.save` or `PostTrainer.save`; no code is unpickled.

    Args:
        path: File name.

    Returns:
        Its parts by name.

    Raises:
        ValueError: If it is not such a checkpoint.
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
    for name, kind in _COUNTERS.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path}: expected a checkpoint of frechet-gan with {name}")
    return state


def load_generator(path: str | os.PathLike[str]) -> tuple[nn.Module, NetworkConfig]:
    """The generator of a checkpoint: the averaged one, if there is one.

    Args:
        path: File name.

    Returns:
        Generator in evaluation mode and the description of its networks.

    Raises:
        ValueError: If it is not a checkpoint, or one of networks that are not described in it.
    """
    state = read_checkpoint(path)
    if state["network"] is None:
        raise ValueError(
            f"{path}: expected a checkpoint of networks from a NetworkConfig; for your own networks load "
            "read_checkpoint(path)['generator'] (or ['average']) into your generator"
        )
    with restoring(path), reading(path, "a checkpoint of frechet-gan"):
        network = NetworkConfig(**state["network"])
        with torch.device("meta"):  # sizes that do not fit the weights take no memory
            generator = build_generator(network)
        generator.load_state_dict(state.get("average") or state["generator"], assign=True)
        generator.requires_grad_(True)
    return generator.eval(), network


@contextmanager
def restoring(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context in which modules and optimizers take over a checkpoint; what does not fit is the file's fault."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{path}: expected weights and states of these networks ({first})") from error


def check_same(path: str | os.PathLike[str], state: Mapping[str, Any], network: object, config: Any) -> None:
    """Refuse a checkpoint of other networks or another configuration.

    Args:
        path: The checkpoint, for the message.
        state: What it holds.
        network: Description of this run's networks, or None.
        config: This run's configuration.

    Raises:
        ValueError: If they differ, naming what does.
    """
    own_network = asdict(network) if isinstance(network, NetworkConfig) else None
    for name, own in (("network", own_network), ("config", asdict(config))):
        found = state[name]
        if found != own:
            there = found if isinstance(found, dict) else {}
            changed = [k for k in own or {} if there.get(k) != (own or {})[k]] or [name]
            raise ValueError(f"{path}: expected the {name} of this run, got other values of {', '.join(changed)}")
