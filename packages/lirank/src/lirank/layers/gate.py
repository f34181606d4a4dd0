r"""Gates on hidden layers, each the identity before training: $h \odot 2\,\sigma(g)$ with g = 0 at the start.

Source: LiRank, arXiv 2402.06859, section 3.3 (dense gating after GateNet); LHUC after Swietojanski and Renals 2014.
"""

import torch
from torch import Tensor, nn


class DenseGate(nn.Module):
    """A gate from the layer itself: full (a matrix) or element-wise (a vector of weights).

    Args:
        width: Width of the layer.
        full: Whether every gate sees the whole layer.
    """

    def __init__(self, width: int, *, full: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width) if full else torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        """Gate a layer.

        Args:
            h: The layer, shape (B, width).

        Returns:
            The gated layer, shape (B, width).
        """
        score = h @ self.weight.T if self.weight.ndim == 2 else h * self.weight
        return h * (2 * torch.sigmoid(score + self.bias))


class LHUC(nn.Module):
    """A gate from a side input, such as the vectors of user and context ("learning hidden unit contributions").

    Args:
        width: Width of the layer.
        side: Width of the side input.
        hidden: Width between the two.
    """

    def __init__(self, width: int, side: int, hidden: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(side, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, h: Tensor, side: Tensor) -> Tensor:
        """Gate a layer by a side input.

        Args:
            h: The layer, shape (B, width).
            side: The side input, shape (B, side).

        Returns:
            The gated layer, shape (B, width).
        """
        return h * (2 * torch.sigmoid(self.last(torch.relu(self.first(side)))))
