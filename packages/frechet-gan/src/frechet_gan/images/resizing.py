"""How an image is brought to an encoder's size: on that, FID depends more than most methods differ.

- `native`: bilinear with antialiasing on bytes (PIL), as the image libraries do it.
- `clean`: bicubic with antialiasing on floats (PIL, channel by channel), as clean-fid does it.
- `legacy-pytorch`: bilinear without antialiasing, as pytorch-fid does it.
- `legacy-tf`: bilinear without antialiasing and without half-pixel centers, as TensorFlow 1 and torch-fidelity do it.

Source:
    arXiv 2104.11222 (clean-fid) compares them.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from frechet_gan.choices import Resize


def resized(pixels: Any, size: int | None, mode: Resize) -> Tensor:
    """An image at an encoder's size.

    Args:
        pixels: Pixels in [0, 255], shape (h, w, c), uint8.
        size: New height and width, in pixels; None leaves the image as it is.
        mode: How.

    Returns:
        Pixels in [0, 255], shape (c, size, size), uint8 if nothing was interpolated or the mode is `native`, else
        float32.
    """
    if size is None or pixels.shape[:2] == (size, size):
        return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))
    if mode == "native":
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        small = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
        return torch.from_numpy(small[None].copy() if small.ndim == 2 else small.transpose(2, 0, 1).copy())
    if mode == "clean":
        small = np.empty((pixels.shape[2], size, size), np.float32)
        for c, target in enumerate(small):
            channel = Image.fromarray(pixels[:, :, c].astype(np.float32))
            np.clip(np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)), 0, 255, out=target)
        return torch.from_numpy(small)
    floats = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))
    if mode == "legacy-pytorch":
        return torch.nn.functional.interpolate(floats[None], (size, size), mode="bilinear", align_corners=False)[0]
    return _like_tensorflow_1(floats, size)


def _like_tensorflow_1(image: Tensor, size: int) -> Tensor:
    """Bilinear interpolation at the points i * (old / new), i = 0, 1, ..."""
    for axis in (1, 2):
        old = image.shape[axis]
        at = torch.arange(size, dtype=torch.float32) * (old / size)
        low = at.floor().long()
        high = (low + 1).clamp_max(old - 1)
        share = (at - low).view([-1 if d == axis else 1 for d in range(3)])
        image = torch.lerp(image.index_select(axis, low), image.index_select(axis, high), share)
    return image
