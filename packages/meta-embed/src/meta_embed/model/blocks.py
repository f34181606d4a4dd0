"""Small networks: perceptrons and the block that reads a member's features."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Args:
        widths: Width of the input, of the hidden layers, and of the output.

    Returns:
        The network.
    """
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(pairwise(widths)):
        layers += [nn.Linear(wide, narrow)] + ([nn.ReLU()] if i < len(widths) - 2 else [])
    return nn.Sequential(*layers)


class MemberBlock(nn.Module):
    """The meta block f(m): a member's features to a vector; without features, one learned vector for all.

    Args:
        id_rows: Rows of the table of every category.
        dense: Number of dense features.
        hidden: Width of the hidden layer; 0 for a linear map.
        width: Length of the vector.
    """

    def __init__(self, id_rows: Sequence[int], dense: int, hidden: int, width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 8) for rows in id_rows)
        inputs = 8 * len(id_rows) + dense
        self.shift = nn.Parameter(torch.zeros(width))
        self.net = perceptron([inputs, *([hidden] if hidden else []), width]) if inputs else None
        if self.net is not None:
            last = self.net[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.bias)
            last.weight.data.mul_(0.1)  # starts near "no member differs"

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        """Vectors of T members.

        Args:
            ids: Categories, shape (T, k'), int64.
            dense: Numbers, shape (T, p').

        Returns:
            Shape (T, width).
        """
        if self.net is None:
            return self.shift.expand(*dense.shape[:-1], -1)
        parts = [table(ids[..., j]) for j, table in enumerate(self.tables)]
        out: Tensor = self.shift + self.net(torch.cat([*parts, dense], -1))
        return out
