"""Rows that change hands: every rank sends each other rank some, in one collective each way."""

from dataclasses import dataclass

import torch
from core_tensor.app.ranks import Ranks
from torch import Tensor


def owned(rank: int, size: int, rows: int) -> tuple[int, int]:
    """Rows that a rank owns: contiguous runs of equal length, as `Shard(0)` of torch's DTensor has them.

    Args:
        rank: The rank.
        size: Number of ranks.
        rows: Rows of the table.

    Returns:
        The first, and one past the last; the last ranks own fewer, or none.
    """
    length = -(-rows // size)
    return min(rank * length, rows), min((rank + 1) * length, rows)


@dataclass(frozen=True)
class Route:
    """Who asked whom for how many rows in one lookup.

    Attributes:
        asked: Rows that this rank asked of each rank.
        serves: Rows that each rank asked of this one.
        ranks: The ranks.
    """

    asked: list[int]
    serves: list[int]
    ranks: Ranks

    @classmethod
    def of(cls, ids: Tensor, rows: int, ranks: Ranks) -> "Route":
        """The route of one lookup.

        Args:
            ids: Distinct rows that this rank wants, ascending, shape (n,), int64.
            rows: Rows of the table.
            ranks: The ranks.

        Returns:
            The route; all ranks have to take part.
        """
        length = -(-rows // ranks.size)
        asked = torch.bincount(ids // length, minlength=ranks.size)
        serves = torch.empty_like(asked)
        torch.distributed.all_to_all_single(serves, asked, group=ranks.group)
        return cls(asked.tolist(), serves.tolist(), ranks)

    def to_owners(self, x: Tensor) -> Tensor:
        """What was asked, or its gradients, go to the ranks that own the rows.

        Args:
            x: One entry per row that this rank asked for, shape (n, ...).

        Returns:
            One entry per row that others asked of this one, in the order of the ranks.
        """
        return self._send(x, self.asked, self.serves)

    def to_askers(self, x: Tensor) -> Tensor:
        """The answers go back.

        Args:
            x: One entry per row that others asked of this one.

        Returns:
            One entry per row that this rank asked for.
        """
        return self._send(x, self.serves, self.asked)

    def _send(self, x: Tensor, out: list[int], back: list[int]) -> Tensor:
        found = x.new_empty(sum(back), *x.shape[1:])
        torch.distributed.all_to_all_single(found, x.contiguous(), back, out, group=self.ranks.group)
        return found
