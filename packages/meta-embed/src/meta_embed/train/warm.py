"""The ID model: a table with a vector per member beside the global block, trained on all events at once.

It is the warm start of the global block, and retrained with a newcomer's events the strongest baseline. With
shrinkage `lambda` a member's row is the MAP estimate under the prior N(mu(m), I / lambda), so the table's solution and
the MAP head's agree where the global block is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from meta_embed.model.personalizer import Personalizer
from meta_embed.tasks.encode import Array
from meta_embed.tasks.events import Events


@dataclass(frozen=True)
class TableOptions:
    """Training with a table.

    Attributes:
        epochs: Passes over the events.
        lr: Adam's rate.
        shrinkage: Precision of the prior of a member's row; infinite leaves the table away (no personalization).
        batch: Rows of a step.
    """

    epochs: int = 5
    lr: float = 0.005
    shrinkage: float = 3.0
    batch: int = 1024


class MemberTable(nn.Module):
    """Deviations of the members' vectors from what their features say.

    Args:
        members: Number of members.
        width: Length of a vector.
    """

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(members, width)
        nn.init.zeros_(self.rows.weight)

    def forward(self, members: Tensor) -> Tensor:
        """Rows of some members."""
        out: Tensor = self.rows(members)
        return out


Judge = Callable[[Tensor], bool]
"""Called after each epoch with every member's vector; false ends the training."""


def train_table(
    model: Personalizer,
    events: Events,
    options: TableOptions,
    seed: int = 0,
    rows: Array | None = None,
    judge: Judge | None = None,
) -> Tensor:
    """Train global block, meta block and table in place.

    Args:
        model: Its prior and its global block are trained.
        events: The log.
        options: How.
        seed: Of the order of the events.
        rows: Positions of the events to learn from; None for all.
        judge: Called after each epoch, so that one training serves all numbers of epochs up to its own.

    Returns:
        Every member's vector mu(m) + row, shape (M, width).
    """
    generator = torch.Generator().manual_seed(seed)
    personal = np.isfinite(options.shrinkage)
    table = MemberTable(len(events), model.width)
    chosen = torch.from_numpy(np.arange(len(events.time)) if rows is None else rows)
    owner = torch.repeat_interleave(torch.arange(len(events)), torch.from_numpy(events.counts))[chosen]
    ids, dense, y, w = (torch.from_numpy(a)[chosen] for a in (events.ids, events.dense, events.y, events.w))
    m_ids, m_dense = torch.from_numpy(events.member_ids), torch.from_numpy(events.member_dense)
    per_member = torch.bincount(owner, minlength=len(events)).clamp_min(1)
    parameters = [p for p in model.parameters() if p.requires_grad] + (list(table.parameters()) if personal else [])
    optimizer = torch.optim.Adam(parameters, lr=options.lr, fused=True)

    def vectors() -> Tensor:
        with torch.no_grad():
            out: Tensor = model.prior(m_ids, m_dense) + (table.rows.weight if personal else 0.0)
        return out

    for _ in range(options.epochs):
        model.train()
        order = torch.randperm(len(chosen), generator=generator)
        for pick in order.split(options.batch):
            member = owner[pick]
            row = table(member)
            e = model.prior(m_ids[member], m_dense[member]) + (row if personal else 0.0)
            each = binary_cross_entropy_with_logits(model.logits(ids[pick], dense[pick], e), y[pick], reduction="none")
            loss = (w[pick] * each).mean()
            if personal:  # every event carries its share of its member's penalty
                share = row.square().sum(-1) / per_member[member]
                loss = loss + 0.5 * options.shrinkage * share.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        if judge is not None and not judge(vectors()):
            break
    model.eval()
    return vectors()
