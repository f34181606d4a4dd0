"""What a position does to the click, learned beside what the item does, and left out when scoring."""

import torch
from core_tensor.checks import check_number
from torch import Tensor, nn


class PositionBias(nn.Module):
    """An additive logit per task and position, relative to position 0.

    Args:
        positions: Number of distinct positions; later ones share the last.
        tasks: Number of tasks.
    """

    def __init__(self, positions: int, tasks: int) -> None:
        super().__init__()
        check_number("positions", positions, low=1, integer=True)
        self.bias = nn.Parameter(torch.zeros(positions, tasks))

    def forward(self, position: Tensor) -> Tensor:
        """Logits to add in training, positions (B,) from 0 -> (B, T)."""
        bias = self.bias - self.bias[:1]  # position 0 is the reference, which is what scoring without a position means
        return bias[position.clamp(0, len(self.bias) - 1)]
