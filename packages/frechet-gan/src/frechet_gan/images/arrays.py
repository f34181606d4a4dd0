"""Images as tensors (n, c, h, w) in [-1, 1]: from what users hold, checked, resized, laid out as a grid.

What is recognized: tensors and arrays of (c, h, w) or (h, w, c), grey arrays (h, w), PIL images, and the first entry or
the entry `image` of tuples and dictionaries. Bytes (uint8) are in [0, 255]; floats in [-1, 1], unless another range is
given. Floats in another range are refused, never guessed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from core_tensor.checks import check_tensor
from PIL import Image
from torch import Tensor

from frechet_gan.images.decoding import pixels_of

KEYS = ("image", "img", "pixel_values", "images", "x")
"""Entries of a dictionary that hold its image, tried in this order."""
_SLACK = 0.01  # resampling and half precision overshoot a little


def unit(images: Tensor) -> Tensor:
    """Images in [-1, 1] as floats: bytes are scaled, floats are left as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_image(item: Any, name: str = "images") -> Tensor:
    """One image from what a data set returns.

    Args:
        item: A tensor, array, PIL image, or a tuple or dictionary that holds one.
        name: The argument's name, for messages.

    Returns:
        Image, shape (c, h, w), bytes or floats as they came.

    Raises:
        TypeError: If it is nothing of the kind.
        ValueError: If its shape is not that of an image.
    """
    if isinstance(item, Mapping):
        key = next((k for k in KEYS if k in item), None)
        if key is None:
            raise TypeError(f"{name}: expected an entry {', '.join(KEYS[:3])}, ... in a dictionary, got {list(item)}")
        return to_image(item[key], name)
    if isinstance(item, (tuple, list)) and item:
        return to_image(item[0], name)
    if isinstance(item, Image.Image):
        item = pixels_of(item, name)
    if isinstance(item, np.ndarray):
        item = torch.from_numpy(np.array(item, order="C"))
    if not isinstance(item, Tensor):
        raise TypeError(f"{name}: expected a tensor, an array or a PIL image, got {type(item).__name__}")
    _check_dtype(name, item)
    if item.ndim == 2:
        item = item[None]
    if item.ndim == 3 and item.shape[0] not in (1, 3) and item.shape[2] in (1, 3):
        item = item.permute(2, 0, 1)
    if item.ndim != 3 or item.shape[0] not in (1, 3):
        raise ValueError(f"{name}: expected shape (c, h, w) or (h, w, c) with c = 1 or 3, got {tuple(item.shape)}")
    image: Tensor = item
    return image


def to_images(images: Any, name: str = "images", value_range: tuple[float, float] | None = None) -> Tensor:
    """A batch of images from what users hold.

    Args:
        images: A tensor (n, c, h, w), an array (n, h, w, c) or (n, c, h, w), or a sequence of images.
        name: The argument's name, for messages.
        value_range: Smallest and largest value of floats; [-1, 1] if None.

    Returns:
        Images, shape (n, c, h, w), in [-1, 1], float32.

    Raises:
        TypeError: If it is nothing of the kind.
        ValueError: If shapes differ or floats lie outside the range.
    """
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.array(images, order="C"))
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ValueError(f"{name}: expected four dimensions (n, c, h, w), got shape {tuple(images.shape)}")
        if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
            images = images.permute(0, 3, 1, 2)
        batch = images
    elif isinstance(images, Sequence) and images:
        batch = stack([to_image(item, name) for item in images], name)
    else:
        raise TypeError(f"{name}: expected a tensor, an array or a sequence of images, got {type(images).__name__}")
    _check_dtype(name, batch)
    check_images(name, batch)
    batch = in_range(name, batch, value_range)
    check_range(name, batch, claimed=value_range is not None)
    return unit(batch).float()


def in_range(name: str, images: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    """Floats of a given range in [-1, 1]; bytes, and floats without a given range, as they are.

    Args:
        name: The argument's name.
        images: Images, of any dtype.
        value_range: Smallest and largest value of floats, or None.

    Returns:
        The images.

    Raises:
        ValueError: If the range is empty, or values lie outside it.
    """
    if value_range is None or images.dtype == torch.uint8:
        return images
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range: expected a smallest and a larger value, got {value_range}")
    least, most = (float(v) for v in images.aminmax())
    if least < low - _SLACK * (high - low) or most > high + _SLACK * (high - low):
        raise ValueError(f"{name}: expected values in [{low:g}, {high:g}], got [{least:.3g}, {most:.3g}]")
    return images if (low, high) == (-1, 1) else (images - low) * (2 / (high - low)) - 1


def _check_dtype(name: str, images: Tensor) -> None:
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise TypeError(f"{name}: expected uint8 or floating-point images, got {images.dtype}")


def stack(items: Sequence[Tensor], name: str = "images") -> Tensor:
    """Images of one shape and kind as one tensor; grey ones among colored ones are repeated to three channels."""
    if len({item.shape[0] for item in items}) > 1:
        items = [item.expand(3, -1, -1) for item in items]
    shapes = {tuple(item.shape) for item in items}
    if len(shapes) > 1 or len({item.dtype for item in items}) > 1:
        kinds = ", ".join(sorted({f"{tuple(i.shape)} {i.dtype}" for i in items})[:4])
        raise ValueError(f"{name}: expected images of one shape and dtype, got {kinds}")
    return torch.stack(list(items))


def check_images(name: str, images: Tensor) -> None:
    """Refuse what is not a batch of images.

    Args:
        name: The argument's name.
        images: What the caller passed.

    Raises:
        ValueError: If it is not (n, 1 or 3, h, w), or not finite.
    """
    check_tensor(name, images, ndim=4, finite=True, nonempty=True)
    if images.shape[1] not in (1, 3):
        raise ValueError(f"{name}: expected 1 or 3 channels, got shape {tuple(images.shape)}")


def check_range(name: str, images: Tensor, *, claimed: bool = False) -> None:
    """Refuse floats that are not in [-1, 1]: bytes as floats, or [0, 1] as `ToTensor` makes them.

    Args:
        name: The argument's name.
        images: Images, of any dtype; bytes are always right.
        claimed: Whether the user gave the range, so that images without dark pixels are believed.

    Raises:
        ValueError: If the values are in another range, naming it and the remedy.
    """
    if images.dtype == torch.uint8:
        return
    low, high = (float(v) for v in images.aminmax())
    if low < -1 - _SLACK or high > 1 + _SLACK:
        remedy = "pass uint8, or x / 127.5 - 1" if high > 2 else "scale them"
        raise ValueError(f"{name}: expected values in [-1, 1], got [{low:.3g}, {high:.3g}]; {remedy}")
    if not claimed and low >= 0 and high > 0.5 and images.shape[0] >= 2:
        raise ValueError(
            f"{name}: expected values in [-1, 1], got [{low:.3g}, {high:.3g}], which looks like [0, 1]; "
            "pass 2 * x - 1 (or uint8)"
        )


def check_same_range(fake: Tensor, real: Tensor) -> None:
    """Refuse to compare images of which one side alone is in [0, 1] or in [0, 255].

    Args:
        fake: Generated images.
        real: Real images.

    Raises:
        ValueError: If the ranges differ, naming both.
    """
    ends = [(-1.0, 1.0) if x.dtype == torch.uint8 else tuple(float(v) for v in x.aminmax()) for x in (fake, real)]
    kinds = ["bytes" if high > 64 else "[0, 1]" if low >= 0 and high <= 1 else "other" for low, high in ends]
    if kinds[0] != kinds[1] and min(x.shape[0] for x in (fake, real)) >= 2:
        (a, b), (c, d) = ends
        raise ValueError(f"sampler, real: expected one range of values, got [{a:.3g}, {b:.3g}] and [{c:.3g}, {d:.3g}]")


def resize(images: Tensor, size: int) -> Tensor:
    """Resize with antialiasing, which FID scores depend on.

    Args:
        images: Images, shape (n, c, h, w).
        size: New height and width, in pixels.

    Returns:
        Images, shape (n, c, size, size).
    """
    if images.shape[-2:] == (size, size):
        return images
    return torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


def grid(images: Tensor, columns: int = 10, margin: int = 1) -> Tensor:
    """Lay images out as one.

    Args:
        images: Images, shape (n, c, h, w), in [-1, 1] or bytes.
        columns: Images per row.
        margin: White pixels between images.

    Returns:
        One image, shape (c, H, W), in [-1, 1].
    """
    check_images("images", images)
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = torch.ones(c, rows * (h + margin) + margin, columns * (w + margin) + margin)
    for i, image in enumerate(unit(images.detach()).float().cpu().clamp(-1, 1)):
        top, left = margin + (i // columns) * (h + margin), margin + (i % columns) * (w + margin)
        canvas[:, top : top + h, left : left + w] = image
    return canvas
