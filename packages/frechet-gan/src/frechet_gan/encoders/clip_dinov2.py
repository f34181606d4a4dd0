"""CLIP and DINOv2 from a local file, in the layouts that their authors, open_clip, timm and transformers ship.

The variant follows from the shapes of the weights. What they do not tell is the activation of CLIP's MLPs: OpenAI's
networks (and DFN's, MetaCLIP's) have x sigmoid(1.702 x), `clip:FILE`; LAION's and DataComp's the exact GELU,
`openclip:FILE`. A `config.json` or `open_clip_config.json` beside the file that says otherwise is believed, by refusal.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from core_tensor.app.files import reading
from torch import Tensor, nn
from torch.nn import functional as F

from frechet_gan.encoders.adapters import IMAGENET_MEAN, IMAGENET_STD
from frechet_gan.encoders.frozen import FrozenEncoder
from frechet_gan.encoders.vision_transformer import Activation, Shape, VisionTransformer
from frechet_gan.encoders.weights import fill, read_weights

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINOV2_SIZE = 224
"""Pixels at which DINOv2's features are compared in print (dgm-eval); its positions are stored for 518."""
DINOV2_FILE = "dinov2_vitl14_pretrain.pth"
"""Name under which torch.hub keeps the network of the published distances, ViT-L/14."""

Renames = tuple[tuple[str, str], ...]
_CLIP: Renames = (  # OpenAI's and open_clip's names
    (r"^visual\.", ""),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "head.weight"),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_CLIP_TRANSFORMERS: Renames = (
    (r"^vision_model\.", ""),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),  # sic
    (r"^post_layernorm\.", "norm."),
    (r"^visual_projection\.weight$", "head.weight"),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
)
_DINOV2: Renames = ((r"^register_tokens$", "reg_token"), (r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."))
_DINOV2_TRANSFORMERS: Renames = (
    (r"^dinov2(_with_registers)?\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
)


def clip(path: str | os.PathLike[str], activation: Literal["gelu", "quick_gelu"] = "quick_gelu") -> FrozenEncoder:
    """The image half of a CLIP vision transformer, projected to the space it shares with texts: what CMMD compares.

    Args:
        path: File of tensors (safetensors, .bin, .pt): of OpenAI's or open_clip's whole network or its `visual` part,
            of timm's, or of transformers' `CLIPModel` and `CLIPVisionModelWithProjection`.
        activation: `quick_gelu` for OpenAI's weights, `gelu` for LAION's.

    Returns:
        An encoder at the size the network was trained at.

    Raises:
        ValueError: If the file holds something else, or a configuration beside it names another activation.
        FileNotFoundError: If there is no such file.
    """
    what = "CLIP's vision transformer"
    weights = _without_wrapper(read_weights(path))
    if "visual.class_embedding" in weights or "class_embedding" in weights:
        found = _renamed(weights, _CLIP, only=("visual.",) if "visual.class_embedding" in weights else ())
        found["head.weight"] = found["head.weight"].mT if "head.weight" in found else torch.empty(0)
    elif "vision_model.embeddings.class_embedding" in weights:
        found = _joined(_renamed(weights, _CLIP_TRANSFORMERS, only=("vision_model.", "visual_projection.")))
        found.pop("embeddings.position_ids", None)
    else:
        found = weights
    for name in {"cls_token", "pos_embed"} & set(found):  # (width,) and (tokens, width) in all layouts but timm's
        found[name] = found[name][(None,) * (3 - found[name].ndim)]
    shape = _shape(found, path, what, most_heads=16)
    if not (shape.norm_first and shape.projection):
        raise ValueError(f"{path}: expected the weights of {what}, found no norm before its blocks or no projection")
    check_activation(Path(path), activation)
    return _encoder(found, shape, activation, shape.grid * shape.patch, 1e-5, (CLIP_MEAN, CLIP_STD), path, what)


def dinov2(path: str | os.PathLike[str] | None = None) -> FrozenEncoder:
    """A DINOv2 network: the normalized class token, at 224 pixels, as distances in it are published.

    Args:
        path: File of tensors as torch.hub keeps it (`dinov2_vitl14_pretrain.pth`, with registers or not), of timm, or
            of transformers' `Dinov2Model`; if None, the ViT-L/14 that torch.hub has downloaded before.

    Returns:
        An encoder.

    Raises:
        ValueError: If the file holds something else.
        FileNotFoundError: If there is no such file.
    """
    what = "DINOv2"
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / DINOV2_FILE
        if not path.exists():
            raise ValueError(f"encoder: expected DINOv2's ViT-L/14 as {path}; name another copy as dinov2:FILE")
    weights = _without_wrapper(read_weights(path))
    if any(name.endswith("embeddings.cls_token") for name in weights):
        found = _joined(_renamed(weights, _DINOV2_TRANSFORMERS))
    else:
        found = _renamed(weights, _DINOV2)
    found.pop("mask_token", None)  # of its training
    positions = found.get("pos_embed", torch.empty(0))
    if positions.ndim == 3 and "reg_token" in found and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        found["pos_embed"] = F.pad(positions, (0, 0, 1, 0))  # timm has added the class token's position to the token
    shape = _shape(found, path, what)
    if not shape.layer_scale:
        raise ValueError(
            f"{path}: expected the weights of {what}, found no scales of its branches (blocks.0.ls1.gamma)"
        )
    activation: Activation = "swiglu" if shape.gated else "gelu"
    size = min(shape.grid, DINOV2_SIZE // shape.patch) * shape.patch
    return _encoder(found, shape, activation, size, 1e-6, (IMAGENET_MEAN, IMAGENET_STD), path, what)


def _without_wrapper(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefix that DistributedDataParallel leaves in checkpoints."""
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _renamed(weights: dict[str, Tensor], renames: Renames, only: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Tensors by timm's names; of all or of those with a prefix."""
    found = {}
    for name, value in weights.items():
        if only and not name.startswith(only):
            continue
        for pattern, to in renames:
            name = re.sub(pattern, to, name)
        found[name] = value
    return found


def _joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of each block as one."""
    found = dict(weights)
    for name in weights:
        rest = [name.replace(".attn.q.", f".attn.{part}.") for part in "kv"]
        if ".attn.q." in name and all(r in found and found[r].shape == found[name].shape for r in rest):
            found[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([found.pop(n) for n in (name, *rest)])
    return found


def _shape(weights: dict[str, Tensor], path: str | os.PathLike[str], what: str, most_heads: int = 10_000) -> Shape:
    """Sizes of the network that weights are of; heads are 64 wide, or `most_heads` as in the largest CLIPs."""

    def sizes(name: str, ndim: int) -> torch.Size:
        if name not in weights or weights[name].ndim != ndim:
            some = ", ".join(list(weights)[:3])
            raise ValueError(f"{path}: expected the weights of {what}, found no {name} among {some}, ...")
        return weights[name].shape

    width, _, patch, _ = sizes("patch_embed.proj.weight", 4)
    tokens, hidden = sizes("pos_embed", 3)[1], sizes("blocks.0.mlp.fc2.weight", 2)[1]
    grid = math.isqrt(tokens - 1) if tokens else 0
    heads = min(width // 64, most_heads)
    whole = heads > 0 and width % (64 if heads < most_heads else heads) == 0
    if grid < 1 or grid**2 + 1 != tokens or not whole or patch < 1:
        raise ValueError(
            f"{path}: expected the weights of {what}, found {tokens} positions of width {width} and patches of {patch} "
            "pixels, of no square image or no whole number of attention heads"
        )
    return Shape(
        width=width,
        depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        heads=heads,
        patch=patch,
        grid=grid,
        hidden=hidden,
        gated=sizes("blocks.0.mlp.fc1.weight", 2)[0] == 2 * hidden,
        registers=sizes("reg_token", 3)[1] if "reg_token" in weights else 0,
        projection=sizes("head.weight", 2)[0] if "head.weight" in weights else 0,
        norm_first="norm_pre.weight" in weights,
        layer_scale="blocks.0.ls1.gamma" in weights,
        projection_bias="head.bias" in weights,
    )


def check_activation(path: Path, activation: str) -> None:
    """Refuse an activation that a configuration beside the file contradicts."""
    for name in ("config.json", "open_clip_config.json"):
        file = path.parent / name
        if not file.is_file():
            continue
        with reading(file, "a configuration in JSON"):
            content: Any = json.loads(file.read_text(encoding="utf-8"))
        says = None
        if name == "config.json":
            vision = content.get("vision_config", content) if isinstance(content, dict) else {}
            says = vision.get("hidden_act") if isinstance(vision, dict) else None
        elif isinstance(content, dict) and isinstance(content.get("model_cfg"), dict):
            says = "quick_gelu" if content["model_cfg"].get("quick_gelu") else "gelu"
        if says is not None and says != activation:
            right = {"gelu": "openclip:FILE", "quick_gelu": "clip:FILE"}.get(str(says), "another encoder")
            raise ValueError(f"{path}: expected {right}, because {name} beside it names the activation {says}")


def _encoder(
    weights: dict[str, Tensor],
    shape: Shape,
    activation: Activation,
    size: int,
    epsilon: float,
    scale: tuple[tuple[float, ...], tuple[float, ...]],
    path: str | os.PathLike[str],
    what: str,
) -> FrozenEncoder:
    with torch.device("meta"):  # no time for weights that are overwritten
        network: nn.Module = VisionTransformer(shape, activation, size, epsilon)
    network = network.to_empty(device="cpu")
    fill(network, weights, path, what)
    return FrozenEncoder(network, size, *scale)
