"""One image file, or its bytes, as pixels: what its mode, depth, orientation and transparency mean.

- Grey (1, L, LA, 16 bits) stays one channel; every other mode becomes RGB.
- 16-bit grey is scaled to 8 bits, not clipped (65535 is 255). Other integers and floats, whose range no header gives,
  are refused.
- The orientation that a camera recorded (EXIF) is honored: pixels are oriented as a viewer shows them. pytorch-fid,
  clean-fid and torch-fidelity ignore it, so figures for such photographs differ from theirs.
- Transparency is composited on white, as a browser shows it; the peers drop it and show the colors beneath.
"""

import io
import os
import warnings
from pathlib import PurePath
from typing import Any

import numpy as np
from core_tensor.app.files import reading
from PIL import Image, ImageOps

Pixels = "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]"
SUFFIXES = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".tga"),
    }
)
"""File names that are taken for images."""
_GREY = frozenset({"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N"})
_ORIENTATION = 0x0112  # EXIF's tag
_DEEP = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})


def is_image(name: str) -> bool:
    """Whether a file name is taken for an image's."""
    return PurePath(name).suffix.lower() in SUFFIXES


def is_grey(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds a grey image, by its header."""
    with reading(path, "a readable image"), Image.open(path) as image:
        return _mode(image) in _GREY


def _mode(image: Image.Image) -> str:
    """Mode of an opened image; Pillow before 11 calls 16-bit grey PNG files `I`, 32 bits, which PNG does not have."""
    return "I;16" if image.mode == "I" and image.format == "PNG" else image.mode


def pixels_of(image: Image.Image, name: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Pixels of an opened image.

    Args:
        image: PIL image.
        name: What it is, for messages.

    Returns:
        Pixels in [0, 255], shape (h, w, c), c = 1 for grey images and 3 for any other, uint8.

    Raises:
        ValueError: If the mode has no fixed range.
    """
    opened = _mode(image)  # a transposed image forgets its format
    if image.getexif().get(_ORIENTATION, 1) != 1:  # transposing would copy every image
        image = ImageOps.exif_transpose(image)
    grey = opened in _GREY
    if opened in _DEEP:
        deep = np.asarray(image).astype(np.float32)
        return (deep / 257).round().astype(np.uint8)[:, :, None]
    if image.mode in {"I", "F"} or image.mode.startswith(("I;", "F;")):
        raise ValueError(f"{name}: expected 8 or 16 bits per channel, got mode {image.mode}, which has no fixed range")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    mode = "L" if grey else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def decode(source: str | os.PathLike[str] | bytes, name: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Pixels of an image file.

    Args:
        source: Its path or its bytes.
        name: What it is called, for messages.

    Returns:
        Pixels in [0, 255], shape (h, w, 1 or 3), uint8.

    Raises:
        ValueError: If it is not a readable image.
        FileNotFoundError: If there is no such file.
    """
    stream: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    with reading(name, "a readable image"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # broken metadata of readable pixels
        try:
            with Image.open(stream) as image:
                return pixels_of(image, name)
        except Image.DecompressionBombWarning as error:
            raise ValueError(str(error)) from error
