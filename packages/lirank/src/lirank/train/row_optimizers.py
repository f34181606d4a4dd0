"""Optimizers of embedding tables that touch only the rows of a batch."""

from collections.abc import Sequence
from typing import Literal

import torch
from core_tensor.app.ranks import ALONE, Ranks
from core_tensor.checks import check_choice
from core_tensor.memory import huge_pages
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
        self.lr, self.weight_decay, self.eps, self.beta2 = lr, weight_decay, eps, 0.999
        weight = table.weight.detach()
        self.state: tuple[Tensor, ...] = (
            (huge_pages(torch.zeros_like(weight)), huge_pages(torch.zeros_like(weight)))
            if kind == "adam"
            else (huge_pages(weight.new_zeros(len(weight))),)
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
        row_update(
            self.table.weight.detach(),
            self.state,
            ids,
            grad,
            kind=self.kind,
            lr=self.lr,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            eps=self.eps,
            step=self.steps,
        )

    def scale(self, rows: Tensor, steps: Tensor) -> Tensor:
        """What the last step divided the gradients of rows by.

        Args:
            rows: Rows of the table, shape (n,), int64.
            steps: Step that last touched each, from 1, shape (n,), int64.

        Returns:
            The root of the second moment, corrected, or of the accumulator, plus eps, shape (n, D) or (n, 1).
        """
        if self.kind == "adagrad":
            return self.state[0][rows].sqrt()[:, None] + self.eps
        correction = 1 - self.beta2 ** steps.double()
        return (self.state[1][rows] / correction.to(self.state[1].dtype)[:, None]).sqrt() + self.eps

    def forget(self, rows: Tensor) -> None:
        """Clear the state of rows that get a new owner.

        Args:
            rows: The rows, shape (n,), int64.
        """
        for tensor in self.state:
            tensor[rows] = 0.0
