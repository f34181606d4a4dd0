"""Everything a killed training needs to resume to the same result: weights, optimizer, random state, history."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core_tensor.app.files import atomic_path, reading
from torch import Tensor, nn

from meta_embed.model.build import put_weights

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class Progress:
    """State of a training run.

    Attributes:
        epoch: Finished epochs of meta-training.
        best: Lowest loss of the held-back members.
        best_epoch: When it was reached; 0 is before meta-training.
        best_state: Weights of that moment.
        history: One entry per epoch.
    """

    epoch: int = 0
    best: float = float("inf")
    best_epoch: int = 0
    best_state: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rng: np.random.Generator, progress: Progress
) -> None:
    """Write a checkpoint, atomically.

    Args:
        folder: The run folder.
        model: The model.
        optimizer: Its optimizer.
        rng: Source of the episodes.
        progress: State of the training run.
    """
    from safetensors.torch import save_file

    tensors = {f"model.{n}": t for n, t in model.state_dict().items()}
    tensors |= {f"best.{n}": t for n, t in progress.best_state.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    about = {
        "epoch": progress.epoch,
        "best": progress.best,
        "best_epoch": progress.best_epoch,
        "history": progress.history,
        "rng": rng.bit_generator.state,
    }
    with atomic_path(folder / CHECKPOINT) as temporary:
        plain = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        save_file(plain, temporary, metadata={"about": json.dumps(about)})


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rng: np.random.Generator) -> Progress | None:
    """Take up a checkpoint, if there is one.

    Args:
        folder: The run folder.
        model: Gets the weights.
        optimizer: Gets its state.
        rng: Gets its state.

    Returns:
        State of the training run, or None.

    Raises:
        ValueError: If the file is broken or of another model.
    """
    from safetensors import safe_open

    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    with reading(path, "a checkpoint of this run"), safe_open(path, "pt") as file:
        about: dict[str, Any] = json.loads(file.metadata()["about"])
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
        for name in file.keys():  # noqa: SIM118
            kind, _, rest = name.partition(".")
            parts[kind][rest] = file.get_tensor(name)
        put_weights(model, parts["best"])  # as a check
        put_weights(model, parts["model"])
        _put_state(optimizer, parts["optimizer"])
        rng.bit_generator.state = about["rng"]
        return Progress(
            int(about["epoch"]), float(about["best"]), int(about["best_epoch"]), parts["best"], list(about["history"])
        )


def _put_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The optimizer's moments, each of its parameter's shape."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, rest = name.partition(".")
        like = parameters[int(index)]
        fits = tensor.shape == like.shape and tensor.dtype == like.dtype
        if rest == "step":
            fits = tensor.numel() == 1 and tensor.dtype == torch.float32 and 1 <= float(tensor) < 2**24
        if not fits:
            raise ValueError(f"optimizer.{name}: expected what belongs to its parameter")
        state.setdefault(int(index), {})[rest] = tensor
    names = {frozenset(entry) for entry in state.values()}
    if len(names) > 1 or set(state) - set(range(len(parameters))):
        raise ValueError("another optimizer's state")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
