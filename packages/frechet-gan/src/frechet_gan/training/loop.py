"""What both trainers are: steps that can be interrupted, an averaged generator, and the state they save."""

from __future__ import annotations

import copy
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Generic, Protocol, TypeVar

import torch
from core_tensor.app import ranks
from torch import Tensor, nn

from frechet_gan.training.checkpoints import check_same, read_checkpoint, restoring, write_checkpoint
from frechet_gan.training.networks import NetworkConfig
from frechet_gan.training.sampling import sample_images, update_average

Result = TypeVar("Result")
Stateful = nn.Module | torch.optim.Optimizer | None


class Config(Protocol):
    """What the loop reads of a configuration, which is a frozen dataclass."""

    @property
    def ema(self) -> float:
        """Decay of the averaged generator; 0 for none."""

    @property
    def seed(self) -> int:
        """Seed of data order and latents."""


class Loop(ABC, Generic[Result]):
    """Steps of a generator, saved and resumed exactly.

    Args:
        generator: Maps latents to images; trained in place, on the device it is on.
        latent: Width of the latents.
        network: Description of the networks, for checkpoints; None for networks of your own.
        config: How to train, a frozen dataclass.
        stream: Sets the random numbers of one kind of trainer apart from another's.
    """

    config: Any

    def __init__(
        self, generator: nn.Module, latent: int, network: NetworkConfig | None, config: Config, stream: int = 0
    ) -> None:
        self.generator, self.latent, self.network, self.config = generator, latent, network, config
        self.ranks = ranks.current()
        self.ranks.broadcast_module(generator)
        self.average = copy.deepcopy(generator).requires_grad_(False) if config.ema else None
        self.random = torch.Generator().manual_seed(config.seed * 1009 + stream + self.ranks.rank)
        self.step_count = 0
        self.cpu_seconds = 0.0

    @abstractmethod
    def _step(self) -> Result: ...

    @abstractmethod
    def _parts(self) -> dict[str, Stateful]: ...

    def step(self) -> Result:
        """One generator step, preceded by its discriminator steps if it has any.

        Returns:
            The loss, or the losses by name.
        """
        start = time.process_time()
        result = self._step()
        if self.average is not None:
            update_average(self.average, self.generator, self.config.ema)
        self.step_count += 1
        self.cpu_seconds += time.process_time() - start
        return result

    def train(self, steps: int, callback: Callable[[int, Result], None] | None = None) -> None:
        """Train until `step_count` reaches a number of steps.

        Args:
            steps: Generator steps in all, including those done before.
            callback: Called after every step with the step's number and what `step` returned.
        """
        while self.step_count < steps:
            result = self.step()
            if callback is not None:
                callback(self.step_count, result)

    def _latents(self, count: int) -> Tensor:
        device = next(self.generator.parameters()).device
        return torch.randn(count, self.latent, generator=self.random).to(device)

    @property
    def sampler(self) -> nn.Module:
        """The generator samples are drawn from: the averaged one, if there is one."""
        return self.generator if self.average is None else self.average

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Images from the generator in evaluation mode.

        Args:
            count: Number of images.
            seed: Seed of the latents.

        Returns:
            Images, shape (count, c, h, w), in [-1, 1], on the CPU.
        """
        return sample_images(self.sampler, self.latent, count, seed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, atomically; under a process group every rank has to call it, and the first one writes.

        `load_generator` reads it too.

        Args:
            path: File name.
        """
        random = self.ranks.gather_rows(self.random.get_state()[None])[0]  # one row per rank
        if not self.ranks.first:
            return
        parts = {name: None if part is None else part.state_dict() for name, part in self._all_parts().items()}
        state = {
            "network": None if self.network is None else asdict(self.network),
            "config": asdict(self.config),
            **parts,
            "random": random,
            "step_count": self.step_count,
            "cpu_seconds": self.cpu_seconds,
        }
        write_checkpoint(path, state)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint, to the same result as an uninterrupted run.

        Args:
            path: File written by `save` with the same networks and configuration.

        Raises:
            ValueError: If it is not a checkpoint of this trainer, or one of other networks, another configuration or
                number of processes.
        """
        state, parts = read_checkpoint(path), self._all_parts()
        missing = [name for name in (*parts, "random") if name not in state]
        if missing:
            raise ValueError(f"{path}: expected a checkpoint of {type(self).__name__}, found no {', '.join(missing)}")
        check_same(path, state, self.network, self.config)
        with restoring(path):
            if state["random"].shape[0] != self.ranks.size:
                raise ValueError(
                    f"{path}: expected a checkpoint of {self.ranks.size} processes, got {state['random'].shape[0]}"
                )
            for name, part in parts.items():
                if part is not None:
                    part.load_state_dict(state[name])
            self.random.set_state(state["random"][self.ranks.rank].clone())  # set_state ignores offsets
        self.step_count, self.cpu_seconds = state["step_count"], state["cpu_seconds"]

    def _all_parts(self) -> dict[str, Stateful]:
        return {"generator": self.generator, "average": self.average, **self._parts()}
