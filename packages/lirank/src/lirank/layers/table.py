"""One embedding table for all id features, whose training costs what a batch touches and not what the table holds."""

from dataclasses import dataclass

import torch
from core_tensor.checks import check_number, check_tensor
from core_tensor.memory import huge_pages
from torch import Tensor, nn
from torch.nn import functional as F

_BLOCK = 4096
"""Rows that are initialized together."""


@dataclass(frozen=True)
class Touched:
    """One lookup of a training step.

    Attributes:
        ids: Rows that were looked up, shape (n,), int64.
        vectors: What they gave, shape (n, D): a leaf whose gradient the row optimizer takes.
    """

    ids: Tensor
    vectors: Tensor


def drawn_seed(seed: int | None) -> int:
    """A seed, or one drawn from torch's generator."""
    return int(torch.randint(1 << 31, ())) if seed is None else seed


def initial_rows(seed: int, start: int, stop: int, dim: int, scale: float) -> Tensor:
    """Rows [start, stop) of a table's initial values, which do not depend on how the rows are shared out.

    Every block of rows has its own generator: a rank draws only its blocks.

    Returns:
        Values, shape (stop - start, dim).
    """
    found = huge_pages(torch.empty(stop - start, dim))
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        drawn = torch.randn(_BLOCK, dim, generator=generator) * scale
        low, high = max(block * _BLOCK, start), min((block + 1) * _BLOCK, stop)
        found[low - start : high - start] = drawn[low - block * _BLOCK : high - block * _BLOCK]
    return found


class FusedTable(nn.Module):
    """Rows of all id features, one below the other.

    With `lazy` (the default) autograd stops at the looked-up rows: `take_touched` hands rows and gradients to a
    `RowOptimizer`, and no gradient of the size of the table ever exists. Otherwise it is an ordinary `nn.Embedding`.

    Args:
        rows: Rows of all features.
        dim: Width D.
        lazy: Whether a `RowOptimizer` trains the table.
        scale: Standard deviation of the initial values.
        seed: Seed of the initial values; None draws one from torch's generator.
    """

    def __init__(self, rows: int, dim: int, *, lazy: bool = True, scale: float = 0.01, seed: int | None = None) -> None:
        super().__init__()
        check_number("rows", rows, low=1, integer=True)
        check_number("dim", dim, low=1, integer=True)
        self.lazy = lazy
        self.weight = nn.Parameter(initial_rows(drawn_seed(seed), 0, rows, dim, scale), requires_grad=not lazy)
        self._touched: list[Touched] = []

    start = 0
    """First row that this process owns: all of them are here."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.weight)

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.weight.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows.

        Args:
            ids: Rows, any shape, int64.

        Returns:
            Vectors, the shape of `ids` with D behind.

        Raises:
            ValueError: If an id is outside the table.
        """
        check_tensor("ids", ids, dtype=torch.int64)
        if ids.numel():
            low, high = ids.aminmax()
            if int(low) < 0 or int(high) >= len(self.weight):
                raise ValueError(f"ids: expected rows in [0, {len(self.weight)}), got {int(low)} to {int(high)}")
        if not self.lazy:
            return F.embedding(ids, self.weight)
        vectors = self.weight.detach().index_select(0, ids.reshape(-1))
        if self.training and torch.is_grad_enabled():
            vectors.requires_grad_()
            self._touched.append(Touched(ids.reshape(-1), vectors))
        return vectors.view(*ids.shape, self.dim)

    def take_touched(self) -> list[Touched]:
        """Hand over the lookups since the last call; the list is emptied.

        Returns:
            The lookups that have a gradient.
        """
        touched, self._touched = self._touched, []
        return [entry for entry in touched if entry.vectors.grad is not None]
