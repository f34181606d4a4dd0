"""Images from a generator in evaluation mode, walks between latents, and averaged weights."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def interpolate(generator: nn.Module, latent: int, rows: int = 8, steps: int = 10, seed: int = 0) -> Tensor:
    """Images along great circles between pairs of latents: smooth where a generator has learnt more than samples.

    Args:
        generator: Maps latents (n, latent) to images.
        latent: Width of the latents.
        rows: Number of pairs.
        steps: Images per pair, both ends included.
        seed: Seed of the latents.

    Returns:
        Images, shape (rows * steps, c, h, w), row by row.
    """
    z = torch.randn(2, rows, 1, latent, generator=torch.Generator().manual_seed(seed))
    t = torch.linspace(0, torch.pi / 2, steps)[:, None]
    between = t.cos() * z[0] + t.sin() * z[1]  # (rows, steps, latent): normal at every t, unlike a straight line
    return images_of(generator, between.flatten(0, 1))


@torch.no_grad()
def images_of(generator: nn.Module, latents: Tensor, batch: int = 500) -> Tensor:
    """Images of given latents, from a generator in evaluation mode.

    Args:
        generator: Maps latents (n, latent) to images.
        latents: Latents, shape (n, latent).
        batch: Latents per call.

    Returns:
        Images, shape (n, c, h, w), float32, on the CPU.
    """
    training = generator.training
    device = next(generator.parameters()).device
    generator.eval()
    try:
        return torch.cat([generator(z.to(device)).float().cpu() for z in latents.split(batch)])
    finally:
        generator.train(training)


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
    return torch.cat(list(sample_batches(generator, latent, count, seed)))


def sample_batches(generator: nn.Module, latent: int, count: int, seed: int = 0, batch: int = 500) -> Iterator[Tensor]:
    """`sample_images` in batches, so that any number of them fits in memory."""
    latents = torch.randn(count, latent, generator=torch.Generator().manual_seed(seed))
    for part in latents.split(batch):
        yield images_of(generator, part, batch)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move averaged weights towards the current ones, and the statistics of batch normalization with them.

    The statistics of the current weights would not fit the averaged ones.

    Args:
        average: Module that holds the averages.
        module: Module in training.
        decay: Weight of the past.
    """
    for weight, new_weight in zip(average.parameters(), module.parameters(), strict=True):
        weight.lerp_(new_weight, 1 - decay)
    for buffer, new_buffer in zip(average.buffers(), module.buffers(), strict=True):
        if buffer.is_floating_point():
            buffer.lerp_(new_buffer, 1 - decay)
        else:
            buffer.copy_(new_buffer)
