"""An embedding table whose rows are shared out over the ranks."""

from dataclasses import dataclass

import torch
from core_tensor.app.ranks import Ranks
from core_tensor.checks import check_number, check_tensor
from torch import Tensor, nn

from lirank.distributed.exchange import Route, owned
from lirank.layers.table import FusedTable, Touched, drawn_seed, initial_rows


@dataclass(frozen=True)
class _Lookup:
    """One lookup of a training step, until its gradients have gone to the owners of the rows."""

    route: Route
    served: Tensor
    vectors: Tensor


class ShardedTable(FusedTable):
    """A `FusedTable` whose every rank owns a run of rows, and their optimizer state.

    A lookup sends each distinct id to the rank that owns it and brings its vector back; `take_touched` sends the
    gradients the same way, so that the owner updates the row with the sum over all ranks. All ranks have to make the
    same calls, also with empty batches.

    Args:
        rows: Rows of the table.
        dim: Width D.
        ranks: The ranks.
        scale: Standard deviation of the initial values.
        seed: Seed of the initial values, which do not depend on the number of ranks; None draws one from torch's
            generator, which has to be in the same state on all ranks.
    """

    def __init__(self, rows: int, dim: int, ranks: Ranks, *, scale: float = 0.01, seed: int | None = None) -> None:
        nn.Module.__init__(self)
        check_number("rows", rows, low=1, integer=True)
        check_number("dim", dim, low=1, integer=True)
        self._all_rows, self.ranks, self.lazy = rows, ranks, True
        self.start, self.stop = owned(ranks.rank, ranks.size, rows)
        local = initial_rows(drawn_seed(seed), self.start, self.stop, dim, scale)
        self.weight = nn.Parameter(local, requires_grad=False)
        self._lookups: list[_Lookup] = []

    @property
    def rows(self) -> int:
        """Number of rows, of all ranks."""
        return self._all_rows

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows, wherever they are.

        Args:
            ids: Rows, any shape, int64; ranks may ask for different numbers of them.

        Returns:
            Vectors, the shape of `ids` with D behind.

        Raises:
            ValueError: If an id is outside the table; on every rank, so that none waits for the others.
        """
        check_tensor("ids", ids, dtype=torch.int64)
        bad = bool(ids.numel()) and not 0 <= int(ids.min()) <= int(ids.max()) < self.rows
        if int(self.ranks.sum(torch.tensor(int(bad)))):
            raise ValueError(f"ids: expected rows in [0, {self.rows}) on every rank")
        distinct, place = ids.reshape(-1).unique(return_inverse=True)
        route = Route.of(distinct, self.rows, self.ranks)
        served = route.to_owners(distinct) - self.start
        vectors = route.to_askers(self.weight.detach()[served])
        if self.training and torch.is_grad_enabled():
            vectors.requires_grad_()
            self._lookups.append(_Lookup(route, served, vectors))
        return vectors[place].view(*ids.shape, self.dim)

    def take_touched(self) -> list[Touched]:
        """The rows of this rank that were looked up since the last call, with their gradients; the list is emptied."""
        lookups, self._lookups = self._lookups, []
        touched = []
        for lookup in lookups:
            gradient = lookup.vectors.grad
            if gradient is None:  # this rank had no use for it; the others may
                gradient = torch.zeros_like(lookup.vectors)
            mine = self.weight.detach()[lookup.served].requires_grad_()
            mine.grad = lookup.route.to_owners(gradient)
            touched.append(Touched(lookup.served, mine))
        return touched
