"""Read images from folders, zip files and npz files in batches, on worker processes; write PNG files."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from core_tensor.app.files import atomic_path
from PIL import Image
from torch import Tensor

from frechet_gan.choices import Resize
from frechet_gan.images.arrays import unit
from frechet_gan.images.decoding import decode
from frechet_gan.images.resizing import resized
from frechet_gan.images.sources import Source, open_images


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read one image; the module `decoding` says what modes, depths and transparency become.

    Args:
        path: File.

    Returns:
        Pixels in [-1, 1], shape (c, h, w), c = 1 for grey images and 3 for any other, float32.

    Raises:
        ValueError: If it is not a readable image.
        FileNotFoundError: If there is no such file.
    """
    return unit(resized(decode(path, str(path)), None, "native"))


class _Prepared(torch.utils.data.Dataset[tuple[int, Tensor]]):
    """The chosen images of a source at their final size, for worker processes."""

    def __init__(self, source: Source, chosen: Sequence[int], size: int | None, mode: Resize, channels: int) -> None:
        self._source, self._chosen, self._size, self._mode, self._channels = source, chosen, size, mode, channels

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        chosen = self._chosen[index]
        pixels = self._source[chosen]
        if pixels.shape[2] < self._channels:
            pixels = np.repeat(pixels, 3, axis=2)
        return chosen, resized(pixels, self._size, self._mode)


def image_batches(
    images: str | os.PathLike[str] | Source,
    batch: int = 64,
    size: int | None = None,
    *,
    resize: Resize = "native",
    workers: int = 0,
    channels: int | None = None,
    chosen: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Batches of images, in the order of their names.

    Args:
        images: Folder, zip file, npz file with `arr_0`, or what `open_images` returned.
        batch: Images per batch.
        size: Height and width to resize to, in pixels; without it all images must have one size.
        resize: How.
        workers: Processes that read and resize; 0 for this one.
        channels: 3 to repeat grey images; None for 1 if all images are grey and 3 otherwise.
        chosen: Indices of the images to read; all if None.

    Yields:
        Images, shape (batch or fewer, c, h, w), in [-1, 1].

    Raises:
        ValueError: If an image cannot be read, or sizes differ and `size` is not given.
    """
    for pixels in _byte_batches(images, batch, size, resize, workers, channels, chosen):
        yield pixels.float().div_(127.5).sub_(1)


def _byte_batches(
    images: str | os.PathLike[str] | Source,
    batch: int,
    size: int | None,
    resize: Resize,
    workers: int,
    channels: int | None,
    chosen: Sequence[int] | None,
) -> Iterator[Tensor]:
    """Batches of pixels in [0, 255], uint8 or float32."""
    source = images if isinstance(images, Source) else open_images(images)
    count = channels or (1 if source.grey() else 3)
    data = _Prepared(source, range(len(source)) if chosen is None else chosen, size, resize, count)
    loader: Any = torch.utils.data.DataLoader(data, batch, num_workers=workers, collate_fn=list)
    shape: torch.Size | None = None
    for items in loader:
        for index, pixels in items:
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise ValueError(
                    f"{source.path}/{source.names[index]}: expected an image of shape {tuple(shape)} as the first one "
                    f"has, got {tuple(pixels.shape)}; resize them (--size)"
                )
        floats = any(p.is_floating_point() for _, p in items)  # one that already had the size stays in bytes
        yield torch.stack([p.float() if floats else p for _, p in items])


def read_bytes(images: str | os.PathLike[str] | Source, size: int | None = None, *, workers: int = 0) -> Tensor:
    """All images, as bytes: a quarter of the memory of floats, and no second copy while they are read.

    Args:
        images: Folder, zip file, npz file with `arr_0`, or what `open_images` returned.
        size: Height and width to resize to, in pixels; without it all images must have one size.
        workers: Processes that read and resize; 0 for this one.

    Returns:
        Pixels in [0, 255], shape (n, c, h, w), uint8.

    Raises:
        ValueError: If an image cannot be read, or sizes differ and `size` is not given.
    """
    source = images if isinstance(images, Source) else open_images(images)
    found: Tensor | None = None
    start = 0
    for pixels in _byte_batches(source, 64, size, "native", workers, None, None):
        if found is None:
            found = torch.empty(len(source), *pixels.shape[1:], dtype=torch.uint8)
        found[start : start + len(pixels)] = pixels
        start += len(pixels)
    assert found is not None  # a source has at least one image
    return found


def read_folder(folder: str | os.PathLike[str], size: int | None = None) -> Tensor:
    """All images of a folder.

    Args:
        folder: Folder, searched recursively.
        size: Height and width to resize to, in pixels.

    Returns:
        Images, shape (n, c, h, w), in [-1, 1].
    """
    return unit(read_bytes(folder, size))


def write_image(path: str | os.PathLike[str], image: Tensor, zoom: int = 1) -> None:
    """Write one image as PNG, atomically.

    Args:
        path: File name.
        image: Pixels in [-1, 1], shape (c, h, w).
        zoom: Repeats every pixel this often in both directions.
    """
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    pixels = np.kron(pixels, np.ones((zoom, zoom, 1), np.uint8))
    with atomic_path(path) as temporary:
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(temporary, format="PNG")
