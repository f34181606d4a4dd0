r"""Residual DCN: the low-rank cross layer with attention between the two skinny matrices.

$$ q = Q^\top x, \quad k = K^\top x, \quad v = V^\top x, \qquad A = \mathrm{softmax}(q k^\top / \tau), \qquad
c = v + \alpha A v, \quad x_{l+1} = x_0 \odot (U c + b) + x_l . $$

Departure: the paper leaves the skip and the shape of A open. Here alpha is a learned scalar that starts at 0, where the
layer is exactly the plain low-rank cross; with c = v + A v no A would give that (A = I gives 2 U v).

Source: LiRank, arXiv 2402.06859, section 3.1.
"""

import math
from typing import Literal

import torch
from core_tensor.checks import check_choice, check_number
from torch import Tensor, nn

SCORES = ("rank", "heads")


class ResidualCross(nn.Module):
    """Low-rank cross layers with attention in the low-rank space.

    Args:
        width: Width n.
        layers: Number of layers; two are enough in the paper.
        rank: Rank r.
        score: `rank`: every one of the r coordinates attends to every other (A is r x r, of rank-1 logits). `heads`:
            the r coordinates are `heads` tokens of r / heads coordinates.
        heads: Tokens for `score="heads"`.
        temperature: Initial tau, learned in log space, hence positive.
    """

    def __init__(
        self,
        width: int,
        layers: int = 2,
        rank: int = 32,
        *,
        score: Literal["rank", "heads"] = "rank",
        heads: int = 4,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("score", score, SCORES)
        check_number("temperature", temperature, low=0, open_low=True)
        check_number("layers", layers, low=1, integer=True)
        if score == "heads" and rank % heads:
            raise ValueError(f"heads: expected a divisor of the rank {rank}, got {heads}")
        self.tokens = rank if score == "rank" else heads
        self.down = nn.ModuleList(nn.Linear(width, 3 * rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, width) for _ in range(layers))
        self.log_temperature = nn.Parameter(torch.full((layers,), math.log(temperature)))
        self.alpha = nn.Parameter(torch.zeros(layers))
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
        for l, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            q, k, v = (part.unflatten(1, (self.tokens, -1)) for part in down(found).chunk(3, 1))  # (B, t, r / t) each
            logits = q @ k.mT / self.log_temperature[l].exp()  # (B, t, t)
            c = v + self.alpha[l] * (logits.softmax(-1) @ v)
            found = torch.addcmul(found, x, up(c.flatten(1)))
        return found
