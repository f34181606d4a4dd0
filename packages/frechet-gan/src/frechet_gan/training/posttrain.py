"""Post-train a generator by the Frechet distance on frozen encoders, with the population decoupled from the batch."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from core_tensor.app.files import atomic_path
from core_tensor.checks import check_number
from torch import Tensor, nn

from frechet_gan.distributed import average_gradients, broadcast_module, gather_rows, world
from frechet_gan.encoders.frozen import Encoder
from frechet_gan.frechet.stats import FeatureStats
from frechet_gan.training.checkpoints import read_checkpoint
from frechet_gan.training.networks import NetworkConfig
from frechet_gan.training.sampling import sample_images, update_average
from frechet_gan.transport.loss import MultiEncoderLoss, TransportLoss, VirtualBatch
from frechet_gan.transport.populations import EMAPopulation, Population


@dataclass(frozen=True)
class PosttrainConfig:
    """How to post-train.

    Attributes:
        batch: Images per step and rank.
        micro_batch: Largest part of a step that is held in memory; larger steps take two exact passes.
        lr: Learning rate of AdamW.
        betas: AdamW's decay rates.
        ema: Decay of the averaged generator that samples are drawn from; 0 for none.
        clip: Largest norm of the gradient; 0 for no limit.
        frozen_norms: Whether batch normalisation keeps its statistics, so that the sampler is what is trained.
        seed: Seed of the latents.
    """

    batch: int = 256
    micro_batch: int | None = None
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    ema: float = 0.99
    clip: float = 0.0
    frozen_norms: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("batch", self.batch, low=2, integer=True)
        check_number("lr", self.lr, low=0, open_low=True)
        check_number("ema", self.ema, low=0, high=1, open_high=True)
        check_number("clip", self.clip, low=0)


def encoder_losses(
    encoders: Mapping[str, Encoder],
    images: Tensor,
    population: Population | None = None,
    *,
    refresh_every: int = 1,
    batch: int = 256,
) -> MultiEncoderLoss:
    """The loss of post-training: one Frechet distance per encoder against all real images, normalised by `sg`.

    Args:
        encoders: Encoders by name.
        images: Real images.
        population: Whose moments are compared; moving averages with β = 0.999 if None.
        refresh_every: Steps between refreshes of the Gaussian map (moving averages only).
        batch: Images per call of an encoder while the statistics are taken.

    Returns:
        The loss, a function of generated images.
    """
    population = population or EMAPopulation()
    return MultiEncoderLoss(
        [
            TransportLoss(
                encoder=encoder,
                reference=FeatureStats.from_loader(encoder, images.split(batch)),
                population=population,
                normalize="sg",
                rescale=True,
                refresh_every=refresh_every,
            )
            for encoder in encoders.values()
        ]
    )


class PostTrainer:
    """Continues the training of a generator on a loss of its images.

    Args:
        generator: Maps latents to images; trained in place.
        network: Its description, for checkpoints.
        loss: Loss on images whose encoders have references, such as `encoder_losses` returns.
        config: How to train.

    Source:
        arXiv 2604.28190.
    """

    def __init__(
        self,
        generator: nn.Module,
        network: NetworkConfig,
        loss: MultiEncoderLoss | TransportLoss,
        config: PosttrainConfig | None = None,
    ) -> None:
        self.config = config = config or PosttrainConfig()
        self.generator, self.network, self.loss = generator.requires_grad_(True), network, loss
        broadcast_module(generator)
        self.average = copy.deepcopy(generator).requires_grad_(False) if config.ema else None
        self.optimizer = torch.optim.AdamW(generator.parameters(), config.lr, config.betas, weight_decay=0.0)
        self.random = torch.Generator().manual_seed(config.seed * 1009 + 7 + world()[0])
        self.step_count = 0
        self.cpu_seconds = 0.0
        self.generator.train(not config.frozen_norms)

    def warm_up(self, count: int) -> None:
        """Fill the populations with the generator's own images before the first step.

        Args:
            count: Number of images.
        """
        losses = self.loss.losses if isinstance(self.loss, MultiEncoderLoss) else [self.loss]
        remaining = count
        while remaining > 0:
            images = self._generate(self._latents(min(self.config.batch, remaining)), grad=False)
            for loss in losses:
                assert isinstance(loss, TransportLoss)
                loss.observe(images)
            remaining -= images.shape[0]

    def step(self) -> float:
        """One step.

        Returns:
            The loss.
        """
        start = time.process_time()
        latents = self._latents(self.config.batch)
        self.optimizer.zero_grad(set_to_none=True)
        micro = self.config.micro_batch
        if micro is not None and micro < latents.shape[0]:
            value = self._two_passes(latents, micro)
        else:
            loss = self.loss(self._generate(latents))
            loss.backward()
            value = float(loss.detach())
        average_gradients(self.generator.parameters())
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.generator.parameters(), self.config.clip)
        self.optimizer.step()
        if self.average is not None:
            update_average(self.average, self.generator, self.config.ema)
        self.step_count += 1
        self.cpu_seconds += time.process_time() - start
        return value

    def train(self, steps: int, callback: Callable[[int, float], None] | None = None) -> None:
        """Train until `step_count` reaches a number of steps.

        Args:
            steps: Steps in all, including those done before.
            callback: Called after every step with the step's number and loss.
        """
        while self.step_count < steps:
            value = self.step()
            if callback is not None:
                callback(self.step_count, value)

    def _two_passes(self, latents: Tensor, micro: int) -> float:
        losses = list(self.loss.losses) if isinstance(self.loss, MultiEncoderLoss) else [self.loss]
        weights = self.loss.weights if isinstance(self.loss, MultiEncoderLoss) else [1.0]
        entered = [VirtualBatch(loss) for loss in losses if isinstance(loss, TransportLoss)]
        for z in latents.split(micro):
            images = self._generate(z, grad=False)
            for batch in entered:
                batch.observe(images)
        value = 0.0
        for z in latents.split(micro):
            images = self._generate(z)
            part = torch.stack(
                [w * b.loss(images).to(images.dtype) for w, b in zip(weights, entered, strict=True)]
            ).sum()
            part.backward()
            value += float(part.detach())
        for batch in entered:
            batch.finish()
        return value

    def _generate(self, latents: Tensor, grad: bool = True) -> Tensor:
        with torch.set_grad_enabled(grad):
            images: Tensor = self.generator(latents)
        return images

    def _latents(self, count: int) -> Tensor:
        device = next(self.generator.parameters()).device
        return torch.randn(count, self.network.latent, generator=self.random).to(device)

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Images from the (averaged) generator in evaluation mode.

        Args:
            count: Number of images.
            seed: Seed of the latents.

        Returns:
            Images, shape (count, c, size, size).
        """
        return sample_images(self.average or self.generator, self.network.latent, count, seed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, atomically; under a process group every rank has to call it, and the first one writes.

        `load_generator` reads it too.

        Args:
            path: File name.
        """
        random = gather_rows(self.random.get_state()[None])[0]  # one row per rank
        if world()[0] != 0:
            return
        state = {
            "network": asdict(self.network),
            "config": asdict(self.config),
            "generator": self.generator.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss": self.loss.state_dict(),
            "random": random,
            "step_count": self.step_count,
            "cpu_seconds": self.cpu_seconds,
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint, to the same result as an uninterrupted run.

        Args:
            path: File written by `save` with the same configuration.

        Raises:
            ValueError: If it is no checkpoint of post-training, or one of another configuration.
        """
        state = read_checkpoint(path)
        if "optimizer" not in state or state["config"] != asdict(self.config):
            raise ValueError(f"{path}: expected a checkpoint of post-training with the configuration of this run")
        self.generator.load_state_dict(state["generator"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss.load_state_dict(state["loss"])
        self.random.set_state(state["random"][world()[0]].clone())  # set_state ignores offsets
        self.step_count, self.cpu_seconds = state["step_count"], state["cpu_seconds"]
