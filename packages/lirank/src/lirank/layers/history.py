"""A transformer over a user's earlier items, with the candidate in every token (early fusion) or only beside them.

Token = (item vector, action vector[, candidate vector]), mapped to the model's width, plus a vector for the distance
from the end. A learned first token keeps attention defined for users without a history. Output: the last token and the
maximum over the tokens.

Source: LiRank, arXiv 2402.06859, section 3.4 (after TransAct, arXiv 2306.00248).
"""

from typing import Literal

import torch
from core_tensor.checks import check_choice, check_number
from torch import Tensor, nn
from torch.nn import functional as F

ACTIONS = 3
"""No, yes, unknown."""


class HistoryTransformer(nn.Module):
    """Encode a history for one candidate.

    Args:
        dim: Width D of item vectors.
        length: Longest history.
        width: Width of the tokens inside.
        layers: Encoder layers; the paper has two.
        heads: Attention heads.
        fusion: `early`: the candidate is part of every token. `late`: it only joins the encoded history.
        action_dim: Width of action vectors; 0 without actions.
        dropout: In training, behind attention and feed-forward.
    """

    def __init__(
        self,
        dim: int,
        length: int,
        *,
        width: int = 32,
        layers: int = 1,
        heads: int = 2,
        fusion: Literal["early", "late"] = "early",
        action_dim: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("fusion", fusion, ("early", "late"))
        check_number("layers", layers, low=1, integer=True)
        if width % heads:
            raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")
        self.early = fusion == "early"
        self.action = nn.Embedding(ACTIONS, action_dim) if action_dim else None
        self.enter = nn.Linear(dim * (2 if self.early else 1) + action_dim, width)
        self.recency = nn.Parameter(torch.randn(length, width) * 0.02)  # by distance from the end
        self.first = nn.Parameter(torch.randn(width) * 0.02)
        self.encoders = nn.ModuleList(_Encoder(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.width = 2 * width

    def forward(self, items: Tensor, actions: Tensor | None, lengths: Tensor, candidate: Tensor) -> Tensor:
        """Encode histories.

        Args:
            items: Item vectors, oldest first, shape (B, L, D); entries from `lengths` on do not matter.
            actions: Their actions, shape (B, L), int64; None without actions.
            lengths: True lengths, at most L, shape (B,), int64.
            candidate: Vector of the candidate, shape (B, D).

        Returns:
            Encoded histories, shape (B, 2 width).
        """
        place = torch.arange(items.shape[1], device=items.device)
        there = place < lengths[:, None]  # (B, L)
        parts = [torch.where(there[:, :, None], items, 0.0)]
        if self.action is not None and actions is not None:
            parts.append(self.action(torch.where(there, actions, 0)))
        if self.early:
            parts.append(candidate[:, None].expand(-1, items.shape[1], -1))
        age = (lengths[:, None] - 1 - place).clamp(0, len(self.recency) - 1)  # (B, L)
        tokens = self.enter(torch.cat(parts, -1)) + self.recency[age]
        tokens = torch.cat([self.first.expand(tokens.shape[0], 1, -1), tokens], 1)  # (B, 1 + L, width)
        there = torch.cat([there.new_ones(there.shape[0], 1), there], 1)  # len() would fix the rows of an export
        for encoder in self.encoders:
            tokens = encoder(tokens, there)
        tokens = self.norm(tokens)
        last = tokens.gather(1, lengths[:, None, None].expand(-1, 1, tokens.shape[2]))[:, 0]
        most = tokens.masked_fill(~there[:, :, None], -torch.inf).amax(1)
        return torch.cat([last, most], 1)


class _Encoder(nn.Module):
    """Attention and a feed-forward of half the width, each behind a norm and beside a skip."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, h, L, d)
        found = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=there[:, None, None, :])
        x = x + self.dropout(self.out(found.transpose(1, 2).flatten(2)))
        fed: Tensor = x + self.dropout(self.feed(self.norms[1](x)))
        return fed
