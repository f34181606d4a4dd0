"""MobileNet v1 as a feature extractor, from an npz of 8-bit weights with folded batch normalisation."""

import os
import re

import numpy as np
import torch
from core_tensor.app.files import read_npz, reading
from torch import Tensor, nn
from torch.nn import functional as F

_STRIDES = {2: 2, 4: 2, 6: 2, 12: 2}  # of the depthwise layers


class MobileNetV1(nn.Module):
    """MobileNet v1 up to its global mean: images in [-1, 1], shape (n, 3, h, w), to features (n, d).

    Args:
        path: npz with `<layer>.w_u8`, `.w_scale`, `.w_zero`, `.b_i32`, `.b_scale` for the layers `Conv2d_0` and
            `Conv2d_{1..13}_{depthwise,pointwise}`; w = (w_u8 - w_zero) w_scale in the layout OHWI.

    Raises:
        ValueError: If an array is missing, or has another shape.

    Source:
        arXiv 1704.04861.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        with reading(path, "the weights of MobileNet v1"):
            file = read_npz(path)
            names = ["Conv2d_0"] + [f"Conv2d_{i}_{kind}" for i in range(1, 14) for kind in ("depthwise", "pointwise")]
            for name in names:
                codes, zero, scale = (file[f"{name}.{part}"] for part in ("w_u8", "w_zero", "w_scale"))
                bias = file[f"{name}.b_i32"].astype(np.float64) * file[f"{name}.b_scale"]
                weight = ((codes.astype(np.float64) - zero) * scale).clip(-1e38, 1e38).astype(np.float32)
                order = (3, 0, 1, 2) if name.endswith("depthwise") else (0, 3, 1, 2)  # 1HWC or OHWI, to torch's OIHW
                self.register_buffer(f"{name}_weight", torch.from_numpy(weight.transpose(order).copy()))
                self.register_buffer(f"{name}_bias", torch.from_numpy(bias.clip(-1e38, 1e38).astype(np.float32)))
            self.names = names
            try:
                finite = bool(torch.isfinite(self(torch.zeros(1, 3, 32, 32))).all())
            except RuntimeError as error:  # shapes that do not follow one another
                raise ValueError(str(error)) from error
            if not finite or not all(bool(torch.isfinite(b).all()) for b in self.buffers()):
                raise ValueError("NaN or infinite weights")

    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: Images, shape (n, 3, h, w), in [-1, 1].

        Returns:
            Features, shape (n, d).
        """
        x = images * (127.5 / 128) - 0.5 / 128  # (pixel - 128) / 128
        for name in self.names:
            weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
            index = int(re.findall(r"\d+", name.removeprefix("Conv2d_"))[0])
            depthwise = name.endswith("depthwise")
            stride = 2 if index == 0 else (_STRIDES.get(index, 1) if depthwise else 1)
            x = F.conv2d(
                _same(x, weight.shape[-1], stride), weight, bias, stride, groups=x.shape[1] if depthwise else 1
            )
            x = x.clamp(0, 6)
        return x.mean((2, 3))


def _same(x: Tensor, kernel: int, stride: int) -> Tensor:
    # TensorFlow's SAME padding: the odd row and column go to the end
    pads = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)
