"""A multi-layer perceptron with an optional gate behind every hidden layer."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lirank.layers.gate import LHUC, DenseGate

GATES = ("none", "dense", "vector", "lhuc")


class MLP(nn.Module):
    """Linear layers with ReLU, gates and dropout.

    Args:
        width: Width of the input.
        widths: Widths of the hidden layers; the paper's large MLP is four of 3500.
        gate: Gate behind every layer: none, `dense` (full), `vector` or `lhuc` (from the input itself).
        dropout: Share of hidden units that are dropped in training.
    """

    def __init__(
        self,
        width: int,
        widths: Sequence[int],
        *,
        gate: Literal["none", "dense", "vector", "lhuc"] = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [width, *widths]
        self.width = sizes[-1]
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.linear = nn.ModuleList(layers)
        for linear in layers:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        self.gates = nn.ModuleList(_gate(gate, w, width) for w in widths) if gate != "none" else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers, (B, width) -> (B, last width)."""
        h = x
        for l, linear in enumerate(self.linear):
            h = torch.relu(linear(h))
            if self.gates is not None:
                gate = self.gates[l]
                h = gate(h, x) if isinstance(gate, LHUC) else gate(h)
            h = self.dropout(h)
        return h


def _gate(kind: str, width: int, side: int) -> nn.Module:
    return LHUC(width, side) if kind == "lhuc" else DenseGate(width, full=kind == "dense")
