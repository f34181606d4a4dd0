"""Images as tensors (n, c, h, w) in [-1, 1], read from folders, written as grids."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from core_tensor.app.files import atomic_path
from core_tensor.checks import check_tensor
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files below a folder, in the order of their names.

    Args:
        folder: Folder, searched recursively.

    Returns:
        Paths.

    Raises:
        NotADirectoryError: If it is no folder.
        ValueError: If there is no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder of images")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: expected images ({', '.join(SUFFIXES)}), found none")
    return files


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read one image.

    Args:
        path: File.

    Returns:
        Pixels in [-1, 1], shape (c, h, w), c = 1 for grey images and 3 for any other, float32.

    Raises:
        ValueError: If it is no readable image.
        FileNotFoundError: If there is no such file.
    """
    try:
        with Image.open(path) as image:
            grey = image.mode in {"1", "L", "I;16", "LA"}
            pixels = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.float32)
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: expected a readable image ({error})") from error
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(pixels / 127.5 - 1)


def image_batches(folder: str | os.PathLike[str], batch: int = 64, size: int | None = None) -> Iterator[Tensor]:
    """Batches of a folder's images, in the order of their names.

    Args:
        folder: Folder, searched recursively.
        batch: Images per batch.
        size: Height and width to resize to, in pixels; without it all images must have one size.

    Yields:
        Images, shape (batch or fewer, c, h, w), in [-1, 1].

    Raises:
        ValueError: If an image cannot be read, or sizes differ and `size` is not given.
    """
    files = image_files(folder)
    shape: torch.Size | None = None
    for start in range(0, len(files), batch):
        images = []
        for path in files[start : start + batch]:
            image = read_image(path)
            if size is not None:
                image = resize(image[None], size)[0]
            shape = shape or image.shape
            if image.shape != shape:
                raise ValueError(
                    f"{path}: expected an image of shape {tuple(shape)} as in the others, got {tuple(image.shape)}; "
                    "resize them with size"
                )
            images.append(image)
        yield torch.stack(images)


def read_folder(folder: str | os.PathLike[str], size: int | None = None) -> Tensor:
    """All images of a folder.

    Args:
        folder: Folder, searched recursively.
        size: Height and width to resize to, in pixels.

    Returns:
        Images, shape (n, c, h, w), in [-1, 1].
    """
    return torch.cat(list(image_batches(folder, size=size)))


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


def check_images(name: str, images: Tensor) -> None:
    """Refuse what is no batch of images.

    Args:
        name: The argument's name.
        images: What the caller passed.

    Raises:
        ValueError: If it is not (n, 1 or 3, h, w), or not finite.
    """
    check_tensor(name, images, ndim=4, finite=True, nonempty=True)
    if images.shape[1] not in (1, 3):
        raise ValueError(f"{name}: expected 1 or 3 channels, got shape {tuple(images.shape)}")


def grid(images: Tensor, columns: int = 10, margin: int = 1) -> Tensor:
    """Lay images out as one.

    Args:
        images: Images, shape (n, c, h, w), in [-1, 1].
        columns: Images per row.
        margin: White pixels between images.

    Returns:
        One image, shape (c, H, W), in [-1, 1].
    """
    check_images("images", images)
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = torch.ones(c, rows * (h + margin) + margin, columns * (w + margin) + margin)
    for i, image in enumerate(images.detach().float().cpu().clamp(-1, 1)):
        top, left = margin + (i // columns) * (h + margin), margin + (i % columns) * (w + margin)
        canvas[:, top : top + h, left : left + w] = image
    return canvas


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
