"""FID's Inception-v3, from the weights that pytorch-fid and torch-fidelity download.

It is the network of TensorFlow's 2015 graph, not torchvision's: average pooling does not count the padding, the last
block takes the maximum of its pooling branch, and the classifier has 1008 outputs. Names are those of the files.
"""

import os
from pathlib import Path

import torch
from core_tensor.app.files import sha256
from torch import Tensor, nn
from torch.nn import functional as F

from frechet_gan.encoders.frozen import FrozenEncoder
from frechet_gan.encoders.weights import fill, read_weights

SIZE = 299
PUBLISHED = "6726825d"
"""Beginning of the SHA-256 of the published file, which its name pt_inception-2015-12-05-6726825d.pth carries."""
FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""Names under which pytorch-fid and torch-fidelity leave it in torch.hub's folder of checkpoints."""


class _Conv(nn.Module):
    """Convolution, batch normalization, ReLU."""

    def __init__(
        self, before: int, after: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (high // 2, wide // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(before, after, (high, wide), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _A(nn.Module):
    """35 x 35 block."""

    def __init__(self, before: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(before, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _Conv(before, 48, 1), _Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(before, 64, 1), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3)
        self.branch_pool = _Conv(before, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, deep, self.branch_pool(_average(x))], 1)


class _B(nn.Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(before, 384, 3, 2, pad=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(before, 64, 1), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), deep, F.max_pool2d(x, 3, 2)], 1)


class _C(nn.Module):
    """17 x 17 block."""

    def __init__(self, before: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(before, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = _Conv(before, inner, 1), _Conv(inner, inner, (1, 7))
        self.branch7x7_3 = _Conv(inner, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(before, inner, 1), _Conv(inner, inner, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _Conv(inner, inner, (1, 7)), _Conv(inner, inner, (7, 1))
        self.branch7x7dbl_5 = _Conv(inner, 192, (1, 7))
        self.branch_pool = _Conv(before, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        deep = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        deep = self.branch7x7dbl_5(self.branch7x7dbl_4(deep))
        return torch.cat([self.branch1x1(x), seven, deep, self.branch_pool(_average(x))], 1)


class _D(nn.Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(before, 192, 1), _Conv(192, 320, 3, 2, pad=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(before, 192, 1), _Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = _Conv(192, 192, (7, 1)), _Conv(192, 192, 3, 2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class _E(nn.Module):
    """8 x 8 block, whose pooling branch takes the average (the first) or the maximum (the last)."""

    def __init__(self, before: int, *, last: bool) -> None:
        super().__init__()
        self.branch1x1 = _Conv(before, 320, 1)
        self.branch3x3_1 = _Conv(before, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(before, 448, 1), _Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(before, 192, 1)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        deep = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.last else _average(x)
        fine = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        coarse = [self.branch3x3dbl_3a(deep), self.branch3x3dbl_3b(deep)]
        return torch.cat([self.branch1x1(x), *fine, *coarse, self.branch_pool(pooled)], 1)


class InceptionFID(nn.Module):
    """FID's Inception-v3 up to its global mean: images (n, 3, 299, 299) in [-1, 1] to features (n, 2048).

    Attributes:
        like_pytorch_fid: Whether pixels p enter as p / 127.5 - 1, as in pytorch-fid, instead of (p - 128) / 128, as in
            the graph, clean-fid and torch-fidelity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.like_pytorch_fid = False
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = _Conv(3, 32, 3, 2, pad=False), _Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = _Conv(32, 64, 3), _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _C(768, 128),
            _C(768, 160),
            _C(768, 160),
            _C(768, 192),
        )
        self.Mixed_7a = _D(768)
        self.Mixed_7b, self.Mixed_7c = _E(1280, last=False), _E(2048, last=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: Images, shape (n, 3, 299, 299), in [-1, 1].

        Returns:
            Features, shape (n, 2048).
        """
        x = images if self.like_pytorch_fid else images * (127.5 / 128) - 0.5 / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (n, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (n, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (n, 2048, 8, 8)
        features: Tensor = x.mean((2, 3))
        return features


def inception(path: str | os.PathLike[str] | None = None) -> FrozenEncoder:
    """FID's network with weights from a local file.

    Args:
        path: `pt_inception-2015-12-05-6726825d.pth`, or a file of its layout; if None, the file that pytorch-fid,
            torchmetrics or torch-fidelity have downloaded before.

    Returns:
        An encoder with 2048 features. Its attribute `published` says whether the file is the published one.

    Raises:
        ValueError: If the file holds other weights, such as torchvision's classifier.
        FileNotFoundError: If there is no such file.
    """
    path = _downloaded() if path is None else path
    network = InceptionFID()
    fill(network, read_weights(path), path, "FID's Inception-v3")
    encoder = FrozenEncoder(network, SIZE)
    encoder.published = sha256(path).startswith(PUBLISHED)
    return encoder


def _downloaded() -> Path:
    """The file that another FID package has downloaded."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in FILES:
        if (folder / name).exists():
            return folder / name
    raise ValueError(
        f"encoder: expected FID's weights as {folder / FILES[0]}; get the file where pytorch-fid gets it (release "
        "fid_weights of mseitzer/pytorch-fid), or name another copy as inception:FILE"
    )
