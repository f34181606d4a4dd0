"""The vision transformer that CLIP and DINOv2 share, up to one feature vector per image, by the names timm uses.

Patches of the image and a class token pass through blocks x + s_1 attention(norm(x)), x + s_2 mlp(norm(x)); the feature
is the class token after a last norm, projected where the network has a projection.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["gelu", "quick_gelu", "swiglu"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a network.

    Attributes:
        width: Width of a token.
        depth: Number of blocks.
        heads: Attention heads.
        patch: Height and width of a patch, in pixels.
        grid: Patches per side that positions are stored for.
        hidden: Inner width of the MLPs.
        gated: Whether their first layer is twice as wide: a gate and a value.
        registers: Number of register tokens.
        projection: Width of the projected feature; 0 for none.
        norm_first: Whether tokens are normalized before the first block, and patches have no bias (CLIP).
        layer_scale: Whether branches have a learned scale (DINOv2).
        projection_bias: Whether the projection has a bias.
    """

    width: int
    depth: int
    heads: int
    patch: int
    grid: int
    hidden: int
    gated: bool = False
    registers: int = 0
    projection: int = 0
    norm_first: bool = False
    layer_scale: bool = False
    projection_bias: bool = False


class VisionTransformer(nn.Module):
    """Images (n, 3, size, size), normalized as the weights want, to features (n, d).

    Args:
        shape: Sizes.
        activation: `gelu`, `quick_gelu` (x sigmoid(1.702 x)) or `swiglu` (a gated unit).
        size: Height and width of the images, in pixels; positions are interpolated if the grid is another one.
        epsilon: Of the norms.

    Source:
        arXiv 2010.11929; 2103.00020 (CLIP), 2304.07193 (DINOv2), 2309.16588 (registers).
    """

    def __init__(self, shape: Shape, activation: Activation, size: int, epsilon: float) -> None:
        super().__init__()
        width = shape.width
        self.shape, self.side = shape, size // shape.patch
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, width, shape.patch, shape.patch, bias=not shape.norm_first)}
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.grid**2, width))
        self.reg_token = nn.Parameter(torch.zeros(1, shape.registers, width)) if shape.registers else None
        self.norm_pre = nn.LayerNorm(width, epsilon) if shape.norm_first else nn.Identity()
        self.blocks = nn.Sequential(*[_Block(shape, activation, epsilon) for _ in range(shape.depth)])
        self.norm = nn.LayerNorm(width, epsilon)
        self.head = nn.Linear(width, shape.projection, shape.projection_bias) if shape.projection else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: Images, shape (n, 3, size, size), normalized.

        Returns:
            Features, shape (n, d).
        """
        patches = self.patch_embed["proj"](images).flatten(2).mT  # (n, side², width)
        first = self.cls_token.expand(images.shape[0], -1, -1)
        x = torch.cat([first, patches], 1) + self._positions()
        if self.reg_token is not None:  # registers have no position
            registers = self.reg_token.expand(images.shape[0], -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)
        x = self.blocks(self.norm_pre(x))
        features: Tensor = self.head(self.norm(x[:, 0]))
        return features

    def _positions(self) -> Tensor:
        """Positions of the class token and the patches, shape (1, 1 + side², width)."""
        grid, side = self.shape.grid, self.side
        if side == grid:
            return self.pos_embed
        stored = self.pos_embed[:, 1:].mT.unflatten(2, (grid, grid))
        # as DINOv2's own code: networks with registers to the size, with antialiasing; older ones by a scale of
        # (side + 0.1) / grid, without
        if self.shape.registers:
            between = F.interpolate(stored, (side, side), mode="bicubic", antialias=True)
        else:
            between = F.interpolate(stored, scale_factor=(side + 0.1) / grid, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], between.flatten(2).mT], 1)


class _Block(nn.Module):
    """Attention and MLP, each after a norm and beside a shortcut."""

    def __init__(self, shape: Shape, activation: Activation, epsilon: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(shape.width, epsilon), nn.LayerNorm(shape.width, epsilon)
        self.attn, self.mlp = _Attention(shape), _MLP(shape, activation)
        self.ls1: nn.Module = _Scale(shape.width) if shape.layer_scale else nn.Identity()
        self.ls2: nn.Module = _Scale(shape.width) if shape.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        scaled: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return scaled


class _Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv, self.proj = nn.Linear(shape.width, 3 * shape.width), nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (n, heads, tokens, width)
        mixed: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class _MLP(nn.Module):
    """Two layers, or a gated unit: silu(gate) times value, packed in the first layer in this order."""

    def __init__(self, shape: Shape, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(shape.width, shape.hidden * (2 if shape.gated else 1))
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.activation == "swiglu":
            gate, value = x.chunk(2, -1)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x) if self.activation == "gelu" else x * torch.sigmoid(1.702 * x)
        mixed: Tensor = self.fc2(x)
        return mixed


class _Scale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
