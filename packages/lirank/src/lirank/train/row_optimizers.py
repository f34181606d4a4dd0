"""Optimizers of embedding tables that touch only the rows of a batch."""

from collections.abc import Sequence
from typing import Literal

import torch
from core_tensor.app.ranks import ALONE, Ranks
from core_tensor.checks import check_choice
from core_tensor.ops.row_update import KINDS, row_update
from torch import Tensor

from lirank.layers.table import FusedTable, Touched


class RowOptimizer:
    """Lazy Adam or row-wise Adagrad on a `FusedTable`.

    Departure: lazy Adam moves a row only in steps that touch it, unlike dense Adam, and so does weight decay.

    Args:
        table: The table.
        kind: `adam` (two moments of the table's size) or `adagrad` (one number per row).
        lr: Learning rate.
        weight_decay: Decoupled decay of touched rows.
        eps: Added to the root.
    """

    def __init__(
        self,
        table: FusedTable,
        kind: Literal["adam", "adagrad"] = "adam",
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        check_choice("kind", kind, KINDS)
        self.table, self.kind = table, kind
        self.lr, self.weight_decay, self.eps = lr, weight_decay, eps
        weight = table.weight.detach()
        self.state: tuple[Tensor, ...] = (
            (torch.zeros_like(weight), torch.zeros_like(weight)) if kind == "adam" else (weight.new_zeros(len(weight)),)
        )
        self.steps = 0

    def step(self, touched: Sequence[Touched], ranks: Ranks = ALONE) -> None:
        """Update the rows of one step.

        Args:
            touched: What `FusedTable.take_touched` gave after the backward pass.
            ranks: Processes with the same table, whose gradients are added.

        Raises:
            ValueError: If a gradient is not finite; nothing has been written then.
        """
        self.steps += 1
        dim = self.table.dim
        ids = torch.cat([entry.ids for entry in touched]) if touched else torch.zeros(0, dtype=torch.int64)
        grads = [entry.vectors.grad for entry in touched]
        grad = torch.cat([g for g in grads if g is not None]) if touched else torch.zeros(0, dim)
        if ranks.size > 1:
            ids, grad = ranks.gather_rows(ids)[0], ranks.gather_rows(grad)[0]
        options = {"kind": self.kind, "lr": self.lr, "weight_decay": self.weight_decay, "eps": self.eps}
        row_update(self.table.weight.detach(), self.state, ids, grad, step=self.steps, **options)  # type: ignore[arg-type]

    def forget(self, rows: Tensor) -> None:
        """Clear the state of rows that get a new owner.

        Args:
            rows: The rows, shape (n,), int64.
        """
        for tensor in self.state:
            tensor[rows] = 0.0
