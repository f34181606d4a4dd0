"""Encoders: any callable from images (n, c, h, w) in [-1, 1] to features (n, d); networks with fixed weights."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from core_tensor.checks import check_tensor
from torch import Tensor, nn

from frechet_gan.images.arrays import check_images, resize, unit

Encoder = Callable[[Tensor], Tensor]


class FrozenEncoder(nn.Module):
    """A network as a feature extractor: fixed weights, evaluation mode, grey images repeated to colour, resized.

    Gradients pass to the images, so that a loss can be built on it; the weights have none.

    Args:
        network: Maps images (n, 3, size, size) to features (n, d).
        size: Height and width the network wants, in pixels.
        mean: Per-channel mean subtracted from images in [0, 1]; None leaves images in [-1, 1].
        std: Per-channel divisor that goes with `mean`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        size: int,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.size = size
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(mean or (-1.0,) * 3).view(shape) * 1.0)
        self.register_buffer("std", torch.tensor(std or (1.0,) * 3).view(shape) * 1.0)
        self.normalised = mean is not None
        self.published: bool | None = None  # whether the weights are a published file, where that is known
        self.eval()

    def train(self, mode: bool = True) -> "FrozenEncoder":  # noqa: ARG002
        """Stay in evaluation mode: a frozen encoder's batch statistics never move.

        Args:
            mode: Ignored.

        Returns:
            Itself.
        """
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: Images, shape (n, 1 or 3, h, w), in [-1, 1].

        Returns:
            Features, shape (n, d).

        Raises:
            ValueError: If the images or the network's output have the wrong shape.
        """
        check_images("images", images)
        colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        x = resize(colour, self.size)
        if self.normalised:
            x = ((x + 1) / 2 - self.mean) / self.std
        return check_features(self.network(x), images.shape[0])


def check_features(features: Any, count: int) -> Tensor:
    """Refuse an encoder's output that is not (n, d).

    Args:
        features: What the encoder returned.
        count: Number of images that went in.

    Returns:
        The features.
    """
    check_tensor("encoder(images)", features, shape=(count, None))
    tensor: Tensor = features
    return tensor


@torch.no_grad()
def encode(
    encoder: Encoder, batches: Iterable[Tensor] | Tensor, batch: int = 256, device: torch.device | str | None = None
) -> Tensor:
    """Features of many images.

    Args:
        encoder: Maps images to features (n, d).
        batches: Batches of images, or one tensor of them; bytes are scaled to [-1, 1].
        batch: Images per call where one tensor is given.
        device: Where the images are moved to; they stay where they are if None.

    Returns:
        Features, shape (n, d), float32 at least, where the encoder left them.

    Raises:
        ValueError: If there are no images or the encoder's output has the wrong shape.
    """
    return torch.cat(list(encoded_batches(encoder, batches, batch, device)))


@torch.no_grad()
def encoded_batches(
    encoder: Encoder, batches: Iterable[Tensor] | Tensor, batch: int = 256, device: torch.device | str | None = None
) -> Iterator[Tensor]:
    """Features of many images, batch by batch, for statistics that need no more; arguments as for `encode`."""
    pieces = batches.split(batch) if isinstance(batches, Tensor) else batches
    count = 0
    for images in pieces:
        ready = unit(images if device is None else images.to(device))
        features = check_features(encoder(ready), images.shape[0])
        count += images.shape[0]
        # squares of half-precision features overflow: all that follows is computed in float32 or wider
        yield features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    if not count:
        raise ValueError("batches: expected at least one batch of images, got none")
