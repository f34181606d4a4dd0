"""Encoders by the names that the command line takes, and what tells one from another."""

from pathlib import Path

import torch
from core_tensor.app.devices import check_device
from core_tensor.app.files import digest
from torch import nn

from frechet_gan.encoders.adapters import Pixels, efficientnet_lite, timm_encoder, torchvision_encoder
from frechet_gan.encoders.clip_dinov2 import clip, dinov2
from frechet_gan.encoders.frozen import Encoder, FrozenEncoder
from frechet_gan.encoders.inception import inception
from frechet_gan.encoders.mobilenet import MobileNetV1


def load_encoder(name: str, *, device: torch.device | str = "cpu") -> Encoder:
    """An encoder by name, as the command line takes it.

    Args:
        name: `efficientnet-lite0` (1, 2), `pixels`, `pixels:SIZE` (resized first), `inception:FILE` (FID's network,
            from the file that pytorch-fid and torch-fidelity download), `inception` (where they have downloaded it),
            `dinov2:FILE` (torch.hub's, timm's or transformers' file), `dinov2` (the ViT-L/14 that torch.hub has
            downloaded), `clip:FILE` (OpenAI's weights), `openclip:FILE` (LAION's), `mobilenet:FILE.npz`,
            `torchvision:MODEL`, or `timm:MODEL`.
        device: Where it runs.

    Returns:
        The encoder.

    Raises:
        ValueError: If the name is unknown, weights cannot be read, or there is no such device.
    """
    device = check_device("device", device)
    kind, _, rest = name.partition(":")
    found: nn.Module
    if kind == "pixels" and not rest:
        found = Pixels()
    elif kind == "pixels" and rest.isdecimal() and 0 < int(rest) < 10_000:
        found = Pixels(int(rest))
    elif kind.removesuffix(kind[-1:]) == "efficientnet-lite" and kind[-1] in "012" and not rest:
        found = efficientnet_lite(int(kind[-1]))
    elif kind == "inception":
        found = inception(rest or None)
    elif kind == "mobilenet" and rest:
        network = MobileNetV1(rest)
        width = network.get_buffer("Conv2d_0_bias").shape[0]
        found = FrozenEncoder(network, 224 if width == 32 else 128)
    elif kind == "torchvision" and rest:
        found = torchvision_encoder(rest)
    elif kind == "timm" and rest:
        found = timm_encoder(rest)
    elif kind == "dinov2":
        found = dinov2(rest or None)
    elif kind in {"clip", "openclip"} and rest:
        found = clip(rest, "quick_gelu" if kind == "clip" else "gelu")
    else:
        raise ValueError(
            "encoder: expected efficientnet-lite0|1|2, pixels[:SIZE], inception:FILE, dinov2:FILE, clip:FILE, "
            f"openclip:FILE, mobilenet:FILE.npz, torchvision:MODEL or timm:MODEL, got {name!r}"
        )
    return found.to(device)


def identity(name: str, encoder: Encoder) -> str:
    """What tells an encoder from another: its kind, the digest of its weights, and the size it sees.

    Args:
        name: The name it was loaded by; a path in it does not count.
        encoder: The encoder.

    Returns:
        A short text, equal for equal encoders on any machine.
    """
    kind, _, rest = name.partition(":")
    if not isinstance(encoder, FrozenEncoder):
        return name
    label = kind if Path(rest).suffix or "/" in rest else name
    weights = digest(*(part for key, value in sorted(encoder.state_dict().items()) for part in (key, value)))
    return f"{label} {weights[:12]} {encoder.size}px"
