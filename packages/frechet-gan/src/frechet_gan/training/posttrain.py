"""Post-train a generator by the Frechet distance on frozen encoders, with the population decoupled from the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from core_tensor.checks import check_number
from torch import Tensor, nn

from frechet_gan.encoders.frozen import Encoder
from frechet_gan.frechet.stats import FeatureStats
from frechet_gan.images.arrays import unit
from frechet_gan.training.loop import Loop, Stateful
from frechet_gan.training.networks import NetworkConfig
from frechet_gan.transport.loss import MultiEncoderLoss, TransportLoss
from frechet_gan.transport.populations import EMAPopulation, Population
from frechet_gan.transport.virtual_batch import VirtualBatch


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
                reference=FeatureStats.from_loader(encoder, (unit(part) for part in images.split(batch))),
                population=population,
                normalize="sg",
                rescale=True,
                refresh_every=refresh_every,
            )
            for encoder in encoders.values()
        ]
    )


class PostTrainer(Loop[float]):
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
        config = config or PosttrainConfig()
        super().__init__(generator.requires_grad_(True), network.latent, network, config, stream=7)
        self.loss = loss
        self.optimizer = torch.optim.AdamW(generator.parameters(), config.lr, config.betas, weight_decay=0.0)
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

    def _parts(self) -> dict[str, Stateful]:
        return {"optimizer": self.optimizer, "loss": self.loss}

    def _step(self) -> float:
        latents = self._latents(self.config.batch)
        self.optimizer.zero_grad(set_to_none=True)
        micro = self.config.micro_batch
        if micro is not None and micro < latents.shape[0]:
            value = self._two_passes(latents, micro)
        else:
            loss = self.loss(self._generate(latents))
            loss.backward()
            value = float(loss.detach())
        self.ranks.average_gradients(self.generator.parameters())
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.generator.parameters(), self.config.clip)
        self.optimizer.step()
        return value

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
