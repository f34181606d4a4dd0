"""Real images to train on: scikit-learn's digits, MNIST files, CIFAR archives, font glyphs, folders."""

import io
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core_tensor.app import datasets
from core_tensor.app.extras import require
from core_tensor.app.files import read_npz, reading
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from frechet_gan.images.arrays import resize, stack, to_image, unit
from frechet_gan.images.files import read_bytes

Images = Tensor | Sequence[Any]  # a tensor, or anything with a length whose items are images, alone or in a tuple


def draw(images: Images, chosen: Tensor) -> Tensor:
    """A batch of real images.

    Args:
        images: A tensor (n, c, h, w), or a data set whose items `arrays.to_image` recognizes: tensors, arrays, PIL
            images, tuples and dictionaries; float in [-1, 1], or uint8 in [0, 255].
        chosen: Indices, shape (m,).

    Returns:
        Images in [-1, 1], shape (m, c, h, w), floating point.
    """
    if isinstance(images, Tensor):
        return unit(images[chosen])
    return unit(stack([to_image(images[i]) for i in chosen.tolist()]))


@dataclass(frozen=True)
class Dataset:
    """Images with labels.

    Attributes:
        images: Images, shape (n, c, h, w): bytes, or floats in [-1, 1].
        labels: Class of each, shape (n,), int64; None where there are none.
    """

    images: Tensor
    labels: Tensor | None

    def part(self, rows: slice) -> "Dataset":
        """Some of the images, with their labels.

        Args:
            rows: Which.

        Returns:
            A new data set.
        """
        return Dataset(self.images[rows], None if self.labels is None else self.labels[rows])

    def resized(self, size: int) -> "Dataset":
        """The same images at another size.

        Args:
            size: Height and width, in pixels.

        Returns:
            A new data set.
        """
        if self.images.shape[-2:] == (size, size):
            return self
        parts = [resize(unit(part), size).clamp(-1, 1) for part in self.images.split(1000)]
        return Dataset(torch.cat(parts), self.labels)


def load_data(name: str, size: int | None = None) -> Dataset:
    """Images by name, as the command line takes it.

    Args:
        name: `digits` (scikit-learn's 1,797 digits of 8 x 8 pixels), `mnist:FOLDER` (IDX files, gzipped or not),
            `cifar:FILE.npz`, `glyphs` (characters of the fonts that matplotlib finds), or images in a folder, a
            zip file or an npz file with `arr_0`.
        size: Height and width to resize to, in pixels.

    Returns:
        The data.

    Raises:
        ValueError: If nothing of that name is known or readable.
    """
    kind, _, rest = name.partition(":")
    if kind == "digits":
        data = digits()
    elif kind == "mnist" and rest:
        data = mnist(rest)
    elif kind == "cifar" and rest:
        data = cifar(rest)
    elif kind == "glyphs":
        data = glyphs(size or 28)
    elif Path(name).is_dir() or Path(name).suffix.lower() in {".zip", ".npz"}:
        return Dataset(read_bytes(name, size), None)
    else:
        raise ValueError(
            "data: expected digits, mnist:FOLDER, cifar:FILE.npz, glyphs, or images in a folder, zip or npz file, "
            f"got {name!r}"
        )
    return data if size is None else data.resized(size)


def digits() -> Dataset:
    """Scikit-learn's handwritten digits.

    Returns:
        1,797 images of 1 x 8 x 8 pixels with labels.
    """
    pictures, labels = datasets.digits("frechet-gan[demo]")
    return Dataset(torch.from_numpy(pictures).float()[:, None] / 8 - 1, torch.from_numpy(labels).long())


def mnist(folder: str | os.PathLike[str], part: str = "t10k") -> Dataset:
    """MNIST from its IDX files.

    Args:
        folder: Holds `<part>-images-idx3-ubyte[.gz]` and `<part>-labels-idx1-ubyte[.gz]`.
        part: `t10k` or `train`.

    Returns:
        Images of 1 x 28 x 28 pixels with labels.

    Raises:
        ValueError: If the files are no IDX files, or hold different numbers of images and labels.
    """
    pixels = datasets.read_idx(Path(folder) / f"{part}-images-idx3-ubyte")
    labels = datasets.read_idx(Path(folder) / f"{part}-labels-idx1-ubyte")
    if pixels.ndim != 3 or labels.shape != pixels.shape[:1] or not len(labels):
        raise ValueError(f"{folder}: expected n images and n labels, got {pixels.shape} and {labels.shape}")
    return Dataset(torch.from_numpy(pixels)[:, None], torch.from_numpy(labels).long())


def cifar(path: str | os.PathLike[str], part: str = "train") -> Dataset:
    """CIFAR-10 as JPEG bytes in one npz: `<part>_jpeg`, `<part>_offsets`, `<part>_labels`.

    Args:
        path: npz file.
        part: `train` or `test`.

    Returns:
        Images of 3 x 32 x 32 pixels with labels.

    Raises:
        ValueError: If arrays are missing, or hold something else.
    """
    names = [f"{part}_{name}" for name in ("jpeg", "offsets", "labels")]
    arrays = read_npz(path, *names)
    jpeg, offsets, labels = (arrays[name] for name in names)
    with reading(path, f"JPEG bytes in {', '.join(names)}"):
        if jpeg.dtype != np.uint8 or any(a.ndim != 1 or a.dtype.kind not in "iu" for a in (jpeg, offsets, labels)):
            raise ValueError("arrays of another shape or dtype")
        if len(offsets) != len(labels) + 1 or not len(labels) or offsets[0] < 0 or (np.diff(offsets) <= 0).any():
            raise ValueError("offsets that do not rise, or not one more than labels")
        if labels.min() < 0 or labels.max() > 9:
            raise ValueError("labels outside 0 to 9")
        pictures = [
            np.asarray(Image.open(io.BytesIO(jpeg[a:b].tobytes())).convert("RGB"))
            for a, b in itertools.pairwise(offsets.tolist())
        ]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return Dataset(images.contiguous(), torch.from_numpy(labels).long())


_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def glyphs(size: int = 28, characters: str = _CHARACTERS, variants: int = 3, seed: int = 0) -> Dataset:
    """Characters in every usable font of this machine, each in a few scales and places.

    Args:
        size: Height and width, in pixels.
        characters: What to draw; the label is the index in this string.
        variants: Pictures per character and font.
        seed: Seed of scales and places.

    Returns:
        White glyphs on black, shape (n, 1, size, size), with labels.
    """
    manager = require("matplotlib.font_manager", "frechet-gan[plot]")
    paths = sorted({f.fname for f in manager.fontManager.ttflist if "LastResort" not in f.fname}, key=os.path.basename)
    generator = np.random.default_rng(seed)
    pictures, labels = [], []
    large = 2 * size  # drawn at twice the size, then averaged
    for path in paths:
        font = ImageFont.truetype(path, int(1.4 * large))
        # a font without letters (mathematical signs, symbols) draws the same box for all of them
        if len({bytes(font.getmask(c)) for c in characters[:8]}) < 8:
            continue
        for label, character in enumerate(characters):
            left, top, right, bottom = font.getbbox(character)
            if right <= left or bottom <= top:
                continue
            drawn = Image.new("L", (int(right - left), int(bottom - top)), 0)
            ImageDraw.Draw(drawn).text((-left, -top), character, fill=255, font=font)
            for _ in range(variants):
                scale = generator.uniform(0.7, 0.9) * large / max(drawn.size)
                shape = tuple(max(1, round(s * scale)) for s in drawn.size)
                canvas = Image.new("L", (large, large), 0)
                place = tuple(int((large - s) / 2 + generator.uniform(-0.04, 0.04) * large) for s in shape)
                canvas.paste(drawn.resize((shape[0], shape[1]), Image.Resampling.BILINEAR), (place[0], place[1]))
                pictures.append(np.asarray(canvas.reduce(2)))
                labels.append(label)
    images = torch.from_numpy(np.stack(pictures))[:, None]
    order = torch.from_numpy(generator.permutation(len(labels)))
    return Dataset(images[order], torch.tensor(labels)[order])
