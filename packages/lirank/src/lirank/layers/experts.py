"""Several tasks on one input: a shared tower, a tower per group of similar tasks, MMoE, PLE.

Sources: LiRank, arXiv 2402.06859, section 3.5 (grouping); MMoE, Ma et al., KDD 2018; PLE, Tang et al., RecSys 2020.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from core_tensor.checks import check_choice, check_number
from torch import Tensor, nn

from lirank.layers.mlp import MLP

KINDS = ("shared", "grouped", "mmoe", "ple")


class MultiTask(nn.Module):
    """One logit per task.

    Args:
        width: Width of the input.
        groups: Group of every task, such as `["click", "click", "contribution"]`; an empty name is its own group.
        kind: How the tasks share.
        widths: Hidden widths of a tower or an expert.
        experts: Experts that all share (mmoe), and that each group has in addition (ple).
        gate_dropout: Share of experts that a gate may not use, in training.
        dropout: Inside the towers.
        gate: Gate of hidden layers, as in `MLP`.
    """

    def __init__(
        self,
        width: int,
        groups: Sequence[str],
        kind: Literal["shared", "grouped", "mmoe", "ple"] = "shared",
        *,
        widths: Sequence[int] = (128,),
        experts: int = 4,
        gate_dropout: float = 0.0,
        dropout: float = 0.0,
        gate: Literal["none", "dense", "vector", "lhuc"] = "none",
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        check_number("experts", experts, low=1, integer=True)
        check_number("gate_dropout", gate_dropout, low=0, high=1, open_high=True)
        named = [group or f"task {i}" for i, group in enumerate(groups)]
        order = list(dict.fromkeys(["all"] * len(named) if kind == "shared" else named))
        self.group = [0 if kind == "shared" else order.index(name) for name in named]
        self.kind, self.gate_dropout = kind, gate_dropout
        own = 0 if kind == "mmoe" else 1 if kind in {"shared", "grouped"} else experts
        common = experts if kind in {"mmoe", "ple"} else 0
        options = {"dropout": dropout, "gate": gate}

        def towers(count: int) -> nn.ModuleList:
            return nn.ModuleList(MLP(width, widths, **options) for _ in range(count))  # type: ignore[arg-type]

        self.common = towers(common)
        self.own = nn.ModuleList(towers(own) for _ in order)
        self.gates = nn.ModuleList(nn.Linear(width, common + own) for _ in order) if common else None
        self.heads = nn.ModuleList(nn.Linear(widths[-1] if widths else width, 1) for _ in named)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of all tasks.

        Args:
            x: What the tasks share, shape (B, width).

        Returns:
            Logits, shape (B, T).
        """
        towers = self.towers(x)
        return torch.cat([head(towers[self.group[i]]) for i, head in enumerate(self.heads)], 1)

    def towers(self, x: Tensor) -> list[Tensor]:
        """What the heads of each group see.

        Args:
            x: What the tasks share, shape (B, width).

        Returns:
            One tensor per group, shape (B, d) each.
        """
        shared = [expert(x) for expert in self.common]
        towers = []
        for g, own in enumerate(self.own):
            found = shared + [expert(x) for expert in own.children()]
            towers.append(found[0] if self.gates is None else self._mixed(self.gates[g](x), found))
        return towers

    def _mixed(self, scores: Tensor, found: list[Tensor]) -> Tensor:
        if self.training and self.gate_dropout and len(found) > 1:
            dropped = torch.rand_like(scores) < self.gate_dropout
            dropped &= ~dropped.all(1, keepdim=True)
            scores = scores.masked_fill(dropped, -torch.inf)
        return torch.einsum("be,ebd->bd", scores.softmax(1), torch.stack(found))
