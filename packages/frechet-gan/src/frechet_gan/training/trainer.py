"""Train a generator by a transport loss in feature space, or by an adversarial baseline, with exact resume."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from frechet_gan.images.arrays import check_images, check_range
from frechet_gan.images.augmentation import augment
from frechet_gan.images.data import Images, draw
from frechet_gan.training.config import TrainConfig
from frechet_gan.training.loop import Loop, Stateful
from frechet_gan.training.networks import NetworkConfig, Networks
from frechet_gan.training.objectives import (
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    learned_encoder_loss,
    r1_penalty,
)
from frechet_gan.training.sampling import sample_images
from frechet_gan.transport.layers import Projection
from frechet_gan.transport.loss import MultiEncoderLoss, TransportLoss


class FrechetTrainer(Loop[dict[str, float]]):
    """Alternates discriminator and generator steps.

    Under an initialised process group every rank trains on its own draws and gradients are averaged, which is exact
    for the transport losses (their population is the union of the ranks' batches).

    Args:
        networks: A description of networks, which checkpoints keep, or networks of your own.
        images: Real images, shape (n, c, h, w): a tensor, float in [-1, 1] or uint8 in [0, 255], or a data set that
            can be indexed and returns such images (c, h, w), alone or first in a tuple.
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
        networks: NetworkConfig | Networks,
        images: Images,
        config: TrainConfig | None = None,
        *,
        image_loss: TransportLoss | MultiEncoderLoss | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        config = config or TrainConfig()
        built = networks.build(config.seed) if isinstance(networks, NetworkConfig) else networks
        self.device = torch.device(device)
        self.discriminator = built.discriminator.to(self.device)
        description = networks if isinstance(networks, NetworkConfig) else None
        super().__init__(built.generator.to(self.device), built.latent, description, config)
        self.ranks.broadcast_module(self.discriminator)
        self.images = images
        self._check_images()
        self.g_optimizer = torch.optim.Adam(self.generator.parameters(), config.lr_g, config.betas)
        self.d_optimizer = torch.optim.Adam(self.discriminator.parameters(), config.lr_d, config.betas)
        self.image_loss = image_loss
        self.loss = (
            None
            if image_loss is not None or config.g_loss == "adversarial"
            else TransportLoss(
                config.g_loss,
                normalize=config.normalize,
                population=config.population,
                rescale=True,
                seed=self.ranks.share(config.seed),  # one projection for all ranks, whatever seeds they were given
            )
        )

    def _check_images(self) -> None:
        real = draw(self.images, torch.arange(min(len(self.images), 2)))
        if isinstance(self.images, Tensor):
            check_images("images", self.images)
            check_range("images", self.images)
        else:  # a few show the range of all
            check_range("images", draw(self.images, torch.arange(0, len(self.images), -(-len(self.images) // 64))))
        shape = sample_images(self.generator, self.latent, 2).shape[1:]
        if real.shape[1:] != shape:
            wanted, got = (f"(n, {', '.join(map(str, sizes))})" for sizes in (shape, real.shape[1:]))
            raise ValueError(f"images: expected shape {wanted} as the generator makes them, got {got}")

    def _step(self) -> dict[str, float]:
        d_loss = 0.0
        if self.image_loss is None:
            for _ in range(self.config.n_dis):
                d_loss = self._discriminator_step()
        return {"d_loss": d_loss, "g_loss": self._generator_step()}

    def _parts(self) -> dict[str, Stateful]:
        return {
            "discriminator": self.discriminator,
            "g_optimizer": self.g_optimizer,
            "d_optimizer": self.d_optimizer,
            "loss": self.image_loss if self.loss is None else self.loss,
        }

    def _discriminator_step(self) -> float:
        config = self.config
        real = self._real(config.batch)
        with torch.no_grad(), self._autocast():
            fake = self.generator(self._latents(config.batch)).float()
        real, fake = self._seen(real), self._seen(fake)
        with self._autocast():
            if config.d_loss == "frechet":
                loss = learned_encoder_loss(self._features(real), self._features(fake)).float()
            else:
                loss = discriminator_loss(config.d_loss, self.discriminator(real), self.discriminator(fake))
        if config.r1:
            loss = loss + config.r1 * r1_penalty(self._scalar(), real)
        if config.gp:
            loss = loss + config.gp * gradient_penalty(self._scalar(), real, fake, self.random)
        self.d_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.ranks.average_gradients(self.discriminator.parameters())
        self.d_optimizer.step()
        return float(loss.detach())

    def _scalar(self) -> Callable[[Tensor], Tensor]:
        # what a gradient penalty smooths: the logit, or a random projection of learned features
        if self.config.d_loss != "frechet":
            return self.discriminator

        def projection(images: Tensor) -> Tensor:
            features = self._features(images)
            direction = torch.randn(features.shape[1], generator=self.random).to(features)
            projected: Tensor = features @ (direction / direction.norm())
            return projected

        return projection

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
        self.ranks.average_gradients(self.generator.parameters())
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
                features, targets = self._compared(fake, real)
            total = total + self.loss(features, targets).float()
        if adversarial:
            with self._autocast():
                total = total + adversarial * generator_loss(self.config.d_loss, self.discriminator(fake)).float()
        return total

    def _compared(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Features of both sides in which the transport loss compares them."""
        if not self.config.layers:
            with torch.no_grad():
                targets = self._features(real)
            return self._features(fake), targets
        with torch.no_grad():
            layers = self._layers(real)
            project = self._projection(layers)
            targets = project(layers)
            unit = project.spread(self.ranks.gather_rows(targets)[0])
        return project(self._layers(fake)) / unit, targets / unit

    def _projection(self, layers: list[Tensor]) -> Projection:
        assert self.loss is not None
        return Projection(layers, self.config.layers, self.loss.generator)  # the same on every rank, and saved

    def _two_passes(self, latents: Tensor, real: Tensor, micro: int) -> float:
        loss = self.loss if self.image_loss is None else self.image_loss
        if not isinstance(loss, TransportLoss) or self.config.adversarial_weight or self.config.diff_augment:
            raise ValueError("micro_batch: expected one transport loss without adversarial part or augmentation")

        features: Callable[[Tensor], Tensor]
        if loss.encoder is not None:
            features = torch.nn.Identity()
        elif self.config.layers:
            features = self._in_units_of(real.split(micro))
        else:
            features = self._features
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

    @torch.no_grad()
    def _in_units_of(self, real: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
        """A projection of layers whose unit is the spread of all real micro-batches."""
        project = self._projection(self._layers(real[0]))
        unit = project.spread(self.ranks.gather_rows(torch.cat([project(self._layers(x)) for x in real]))[0])

        def features(images: Tensor) -> Tensor:
            return project(self._layers(images)) / unit

        return features

    def _layers(self, images: Tensor) -> list[Tensor]:
        layers = getattr(self.discriminator, "layers", None)
        if callable(layers) and not isinstance(layers, torch.nn.Module):  # many a network keeps modules under this name
            return list(layers(images))
        return [images, self._features(images)]  # networks of your own show pixels and features at least

    def _features(self, images: Tensor) -> Tensor:
        discriminator: Any = self.discriminator  # its method `features` is no part of nn.Module
        features: Tensor = discriminator.features(images)
        return features

    def _generate(self, latents: Tensor) -> Tensor:
        with self._autocast():
            images: Tensor = self.generator(latents)
        return images.float()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.bf16 else nullcontext()

    def _seen(self, images: Tensor) -> Tensor:
        return augment(images, self.random) if self.config.diff_augment else images

    def _real(self, count: int) -> Tensor:
        chosen = torch.randint(0, len(self.images), (count,), generator=self.random)
        return draw(self.images, chosen).to(self.device)
