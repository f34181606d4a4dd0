"""Train a generator by a transport loss in feature space, or by an adversarial baseline, with exact resume."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from core_tensor.checks import check_choice, check_number
from core_tensor.files import atomic_path
from torch import Tensor, nn

from frechet_gan.distributed import average_gradients, broadcast_module, world
from frechet_gan.images import check_images
from frechet_gan.loss import MultiEncoderLoss, TransportLoss
from frechet_gan.networks import NetworkConfig, build_networks
from frechet_gan.objectives import (
    D_LOSSES,
    DLoss,
    augment,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    learned_encoder_loss,
    r1_penalty,
)
from frechet_gan.plans import PLANS, PlanName

GLoss = Literal["adversarial"] | PlanName


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        g_loss: The generator's loss: a transport plan in the discriminator's features, or `adversarial`.
        d_loss: `bce`, `hinge`, `wgan`, or `frechet`: features learned to maximise the whitened distance.
        r1: Weight γ of R1 on real images; 0 for none.
        gp: Weight of WGAN-GP's penalty; 0 for none.
        n_dis: Discriminator steps per generator step.
        batch: Images per discriminator step and rank.
        g_batch: Images per generator step and rank; `batch` if None.
        micro_batch: Largest part of a generator step that is held in memory; larger steps take two exact passes.
        normalize: Normalisation of the transport loss: `none`, `sg` or `whiten`.
        adversarial_weight: Weight of the adversarial loss added to a transport loss.
        lr_g: Learning rate of the generator.
        lr_d: Learning rate of the discriminator.
        betas: Adam's decay rates.
        ema: Decay of the averaged generator that samples are drawn from; 0 for none.
        diff_augment: Whether the discriminator sees augmented images only.
        bf16: Whether networks run in bfloat16 (statistics stay in float64).
        seed: Seed of weights, data order and latents.
    """

    g_loss: GLoss = "gaussian"
    d_loss: DLoss = "bce"
    r1: float = 1.0
    gp: float = 0.0
    n_dis: int = 1
    batch: int = 128
    g_batch: int | None = None
    micro_batch: int | None = None
    normalize: Literal["none", "sg", "whiten"] = "none"
    adversarial_weight: float = 0.0
    lr_g: float = 5e-4
    lr_d: float = 5e-4
    betas: tuple[float, float] = (0.5, 0.99)
    ema: float = 0.0
    diff_augment: bool = False
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("g_loss", self.g_loss, ("adversarial", *PLANS))
        check_choice("d_loss", self.d_loss, D_LOSSES)
        for name in ("n_dis", "batch"):
            check_number(name, getattr(self, name), low=1, integer=True)
        for name in ("r1", "gp", "adversarial_weight"):
            check_number(name, getattr(self, name), low=0)
        for name in ("lr_g", "lr_d"):
            check_number(name, getattr(self, name), low=0, open_low=True)
        check_number("ema", self.ema, low=0, high=1, open_high=True)
        if self.d_loss == "frechet" and (self.g_loss == "adversarial" or self.adversarial_weight):
            raise ValueError("g_loss: expected a transport plan with d_loss 'frechet', which learns no logit")


PRESETS: dict[str, TrainConfig] = {
    "frechet": TrainConfig(),
    "ot": TrainConfig(g_loss="assignment"),
    "sinkhorn": TrainConfig(g_loss="sinkhorn"),
    "sliced": TrainConfig(g_loss="sliced"),
    "max-sliced": TrainConfig(g_loss="max_sliced"),
    "mmd": TrainConfig(g_loss="mmd"),
    "advfd": TrainConfig(d_loss="frechet", normalize="whiten"),
    "ns": TrainConfig(g_loss="adversarial"),
    "hinge": TrainConfig(g_loss="adversarial", d_loss="hinge", r1=0.0),
    "wgan-gp": TrainConfig(g_loss="adversarial", d_loss="wgan", r1=0.0, gp=10.0, n_dis=3),
}
"""Methods by the name the command line takes; `hinge` is meant for a network with spectral norm."""


class FrechetTrainer:
    """Alternates discriminator and generator steps.

    Under an initialised process group every rank trains on its own draws and gradients are averaged, which is exact
    for the transport losses (their population is the union of the ranks' batches).

    Args:
        network: The networks, for checkpoints that can be read without code.
        images: Real images, shape (n, c, size, size), in [-1, 1].
        config: How to train.
        image_loss: A loss on images (a `TransportLoss` with an encoder, or several) used instead of the
            discriminator's features; the discriminator is not trained then.
        device: Where to train.

    Raises:
        ValueError: If the images do not fit the networks.

    Source:
        arXiv 2003.11774: the discriminator learns to classify, the generator only sees the distance.
    """

    def __init__(
        self,
        network: NetworkConfig,
        images: Tensor,
        config: TrainConfig | None = None,
        *,
        image_loss: TransportLoss | MultiEncoderLoss | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config = config or TrainConfig()
        self.network = network
        self.device = torch.device(device)
        check_images("images", images)
        if images.shape[1:] != (network.channels, network.size, network.size):
            raise ValueError(
                f"images: expected shape (n, {network.channels}, {network.size}, {network.size}), "
                f"got {tuple(images.shape)}"
            )
        self.images = images
        generator, discriminator = build_networks(network, config.seed)
        self.generator, self.discriminator = generator.to(self.device), discriminator.to(self.device)
        for module in (self.generator, self.discriminator):
            broadcast_module(module)
        self.average = copy.deepcopy(self.generator).requires_grad_(False) if config.ema else None
        self.g_optimizer = torch.optim.Adam(self.generator.parameters(), config.lr_g, config.betas)
        self.d_optimizer = torch.optim.Adam(self.discriminator.parameters(), config.lr_d, config.betas)
        self.image_loss = image_loss
        self.loss = (
            None
            if image_loss is not None or config.g_loss == "adversarial"
            else TransportLoss(config.g_loss, normalize=config.normalize, seed=config.seed)
        )
        self.random = torch.Generator().manual_seed(config.seed * 1009 + world()[0])
        self.step_count = 0
        self.cpu_seconds = 0.0

    def step(self) -> dict[str, float]:
        """One generator step, preceded by its discriminator steps.

        Returns:
            The losses, `d_loss` and `g_loss`.
        """
        start = time.process_time()
        d_loss = 0.0
        if self.image_loss is None:
            for _ in range(self.config.n_dis):
                d_loss = self._discriminator_step()
        g_loss = self._generator_step()
        if self.average is not None:
            update_average(self.average, self.generator, self.config.ema)
        self.step_count += 1
        self.cpu_seconds += time.process_time() - start
        return {"d_loss": d_loss, "g_loss": g_loss}

    def train(self, steps: int, callback: Callable[[int, dict[str, float]], None] | None = None) -> None:
        """Train until `step_count` reaches a number of steps.

        Args:
            steps: Generator steps in all, including those done before.
            callback: Called after every step with the step's number and losses.
        """
        while self.step_count < steps:
            losses = self.step()
            if callback is not None:
                callback(self.step_count, losses)

    def _discriminator_step(self) -> float:
        config = self.config
        real = self._real(config.batch)
        with torch.no_grad(), self._autocast():
            fake = self.generator(self._latents(config.batch)).float()
        real, fake = self._seen(real), self._seen(fake)
        with self._autocast():
            if config.d_loss == "frechet":
                loss = learned_encoder_loss(
                    self.discriminator.features(real), self.discriminator.features(fake)
                ).float()
            else:
                loss = discriminator_loss(config.d_loss, self.discriminator(real), self.discriminator(fake))
        if config.r1:
            loss = loss + config.r1 * r1_penalty(self._scalar(), real)
        if config.gp:
            loss = loss + config.gp * gradient_penalty(self._scalar(), real, fake, self.random)
        self.d_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.discriminator.parameters())
        self.d_optimizer.step()
        return float(loss.detach())

    def _scalar(self) -> Callable[[Tensor], Tensor]:
        # what a gradient penalty smooths: the logit, or a random projection of learned features
        if self.config.d_loss != "frechet":
            return self.discriminator
        direction = torch.randn(self.network.features, generator=self.random).to(self.device)
        direction /= direction.norm()
        return lambda images: self.discriminator.features(images) @ direction

    def _generator_step(self) -> float:
        config = self.config
        count = config.g_batch or config.batch
        latents, real = self._latents(count), self._real(count)  # fresh reals: the discriminator has seen its own
        self.discriminator.requires_grad_(False)
        self.g_optimizer.zero_grad(set_to_none=True)
        try:
            if config.micro_batch is not None and config.micro_batch < count:
                value = self._two_passes(latents, real, config.micro_batch)
            else:
                loss = self._generator_loss(self._generate(latents), real)
                loss.backward()
                value = float(loss.detach())
        finally:
            self.discriminator.requires_grad_(True)
        average_gradients(self.generator.parameters())
        self.g_optimizer.step()
        return value

    def _generator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        if self.image_loss is not None:
            needs_real = not isinstance(self.image_loss, TransportLoss) or self.image_loss.reference is None
            image_loss: Tensor = self.image_loss(fake, real if needs_real else None)
            return image_loss
        fake, real = self._seen(fake), self._seen(real)
        adversarial = self.config.adversarial_weight if self.loss is not None else 1.0
        total = fake.new_zeros(())
        if self.loss is not None:
            with self._autocast():
                features = self.discriminator.features(fake)
                with torch.no_grad():
                    targets = self.discriminator.features(real)
            total = total + self.loss(features, targets).float()
        if adversarial:
            with self._autocast():
                total = total + adversarial * generator_loss(self.config.d_loss, self.discriminator(fake)).float()
        return total

    def _two_passes(self, latents: Tensor, real: Tensor, micro: int) -> float:
        loss = self.loss if self.image_loss is None else self.image_loss
        if not isinstance(loss, TransportLoss) or self.config.adversarial_weight or self.config.diff_augment:
            raise ValueError("micro_batch: expected one transport loss without adversarial part or augmentation")

        def features(images: Tensor) -> Tensor:
            return images if loss.encoder is not None else self.discriminator.features(images)

        value = 0.0
        with loss.virtual_batch() as batch:
            with torch.no_grad():
                for z, x in zip(latents.split(micro), real.split(micro), strict=True):
                    batch.observe(features(self._generate(z)), features(x) if loss.reference is None else None)
            for z in latents.split(micro):
                part = batch.loss(features(self._generate(z)))
                part.backward()
                value += float(part.detach())
        return value

    def _generate(self, latents: Tensor) -> Tensor:
        with self._autocast():
            images: Tensor = self.generator(latents)
        return images.float()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.bf16 else nullcontext()

    def _seen(self, images: Tensor) -> Tensor:
        return augment(images, self.random) if self.config.diff_augment else images

    def _real(self, count: int) -> Tensor:
        chosen = torch.randint(0, self.images.shape[0], (count,), generator=self.random)
        return self.images[chosen].to(self.device)

    def _latents(self, count: int) -> Tensor:
        return torch.randn(count, self.network.latent, generator=self.random).to(self.device)

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
            Images, shape (count, c, size, size), in [-1, 1], on the CPU.
        """
        return sample_images(self.sampler, self.network.latent, count, seed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, atomically.

        Args:
            path: File name.
        """
        loss = self.image_loss if self.loss is None else self.loss
        state = {
            "network": asdict(self.network),
            "config": asdict(self.config),
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "g_optimizer": self.g_optimizer.state_dict(),
            "d_optimizer": self.d_optimizer.state_dict(),
            "loss": None if loss is None else loss.state_dict(),
            "random": self.random.get_state(),
            "step_count": self.step_count,
            "cpu_seconds": self.cpu_seconds,
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint, to the same result as an uninterrupted run.

        Args:
            path: File written by `save` with the same networks and configuration.

        Raises:
            ValueError: If it is no checkpoint, or one of other networks or another configuration.
        """
        state = read_checkpoint(path)
        for name, own in (("network", asdict(self.network)), ("config", asdict(self.config))):
            if state[name] != own:
                changed = [k for k in own if state[name].get(k) != own[k]]
                raise ValueError(f"{path}: expected the {name} of this run, got other values of {', '.join(changed)}")
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.g_optimizer.load_state_dict(state["g_optimizer"])
        self.d_optimizer.load_state_dict(state["d_optimizer"])
        loss = self.image_loss if self.loss is None else self.loss
        if loss is not None:
            loss.load_state_dict(state["loss"])
        self.random.set_state(state["random"])
        self.step_count, self.cpu_seconds = state["step_count"], state["cpu_seconds"]


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
    """
    state = read_checkpoint(path)
    network = NetworkConfig(**state["network"])
    generator = build_networks(network)[0]
    generator.load_state_dict(state["average"] or state["generator"])
    return generator.eval(), network


def latent_batches(count: int, latent: int, seed: int, batch: int = 500) -> Iterator[Tensor]:
    """Latents in batches, the same whatever the batch size of a later step.

    Args:
        count: Number of latents.
        latent: Width.
        seed: Seed.
        batch: Latents per batch.

    Yields:
        Latents, shape (batch or fewer, latent).
    """
    yield from torch.randn(count, latent, generator=torch.Generator().manual_seed(seed)).split(batch)


@torch.no_grad()
def sample_images(generator: nn.Module, latent: int, count: int, seed: int = 0) -> Tensor:
    """Images from a generator in evaluation mode.

    Args:
        generator: Maps latents (n, latent) to images.
        latent: Width of the latents.
        count: Number of images.
        seed: Seed of the latents.

    Returns:
        Images, shape (count, c, h, w), float32, on the CPU.
    """
    training = generator.training
    device = next(generator.parameters()).device
    generator.eval()
    try:
        return torch.cat([generator(z.to(device)).float().cpu() for z in latent_batches(count, latent, seed)])
    finally:
        generator.train(training)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move averaged weights towards the current ones; buffers are copied.

    Args:
        average: Module that holds the averages.
        module: Module in training.
        decay: Weight of the past.
    """
    for weight, new_weight in zip(average.parameters(), module.parameters(), strict=True):
        weight.lerp_(new_weight, 1 - decay)
    for buffer, new_buffer in zip(average.buffers(), module.buffers(), strict=True):
        buffer.copy_(new_buffer)
