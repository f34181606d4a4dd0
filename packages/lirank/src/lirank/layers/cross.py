r"""The cross network of DCNv2, full and low-rank.

$$ x_{l+1} = x_0 \odot (W_l x_l + b_l) + x_l, \qquad W_l \in R^{n \times n} \text{ or } W_l = U_l V_l^\top . $$

Source: DCN V2, arXiv 2008.13535; low-rank in LiRank, arXiv 2402.06859, section 3.1.
"""

import math

import torch
from core_tensor.checks import check_number
from torch import Tensor, nn


class CrossNetwork(nn.Module):
    """Full or low-rank cross layers.

    Args:
        width: Width n of the input and the output.
        layers: Number of layers.
        rank: Rank of every W; None for full matrices.
    """

    def __init__(self, width: int, layers: int = 2, rank: int | None = None) -> None:
        super().__init__()
        check_number("width", width, low=1, integer=True)
        check_number("layers", layers, low=1, integer=True)
        if rank is None:
            self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        else:
            check_number("rank", rank, low=1, integer=True)
            self.maps = nn.ModuleList(
                nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width)) for _ in range(layers)
            )
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Cross the input with itself.

        Args:
            x: Input, shape (B, n).

        Returns:
            Output, shape (B, n).
        """
        found = x
        for layer in self.maps:
            found = torch.addcmul(found, x, layer(found))
        return found
