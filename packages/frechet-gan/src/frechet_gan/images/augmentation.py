"""DiffAugment: differentiable changes of the images a discriminator sees, real and generated ones alike."""

import torch
from torch import Tensor
from torch.nn import functional as F


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Colour, translation and cutout, drawn for every image.

    Args:
        images: Images, shape (n, c, h, w), in [-1, 1].
        generator: Draws the changes.

    Returns:
        Changed images, differentiable in the given ones.

    Source:
        arXiv 2006.10738, policy `color,translation,cutout`.
    """
    return cut_out(translate(recolour(images, generator), generator), generator)


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness by up to 1/2, saturation by a factor up to 2, contrast by one in [1/2, 3/2].

    Args:
        images: Images, shape (n, c, h, w).
        generator: Draws the changes.

    Returns:
        Images of the same shape.
    """
    drawn = torch.rand(3, images.shape[0], 1, 1, 1, generator=generator).to(images)
    brightness, saturation, contrast = drawn.unbind()
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def translate(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to an eighth of the size; what comes in is black.

    Args:
        images: Images, shape (n, c, h, w).
        generator: Draws the shifts.

    Returns:
        Images of the same shape.
    """
    n, _, h, w = images.shape
    reach_h, reach_w = max(h // 8, 1), max(w // 8, 1)
    top = torch.randint(0, 2 * reach_h + 1, (n, 1), generator=generator).to(images.device)
    left = torch.randint(0, 2 * reach_w + 1, (n, 1), generator=generator).to(images.device)
    padded = F.pad(images, (reach_w, reach_w, reach_h, reach_h), value=-1.0)
    rows = top + torch.arange(h, device=images.device)  # (n, h)
    columns = left + torch.arange(w, device=images.device)  # (n, w)
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut_out(images: Tensor, generator: torch.Generator) -> Tensor:
    """Grey out a square of half the size, somewhere.

    Args:
        images: Images, shape (n, c, h, w).
        generator: Draws the places.

    Returns:
        Images of the same shape.
    """
    n, _, h, w = images.shape
    inside = []
    for size in (h, w):
        centre = torch.randint(0, size + 1, (n, 1), generator=generator)
        position = torch.arange(size)
        inside.append((position >= centre - size // 4) & (position < centre + size // 4))  # (n, size)
    hole = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(images.device)
    return images.masked_fill(hole, 0.0)
