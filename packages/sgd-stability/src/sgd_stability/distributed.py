"""Work shared over the ranks of a process group: every rank takes a range of the samples, then all have the sums."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Who takes part.

    Attributes:
        rank: This process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    def range(self, n: int) -> tuple[int, int]:
        """This rank's samples.

        Args:
            n: Samples of all ranks.

        Returns:
            First, and one past the last.
        """
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place.

        Args:
            x: Of one shape on every rank.

        Returns:
            The sum.
        """
        if self.size > 1:
            shared = x.cuda() if x.device.type == "cpu" and dist.get_backend() == "nccl" else x
            dist.all_reduce(shared)
            x.copy_(shared)
        return x

    def rows(self, n: int, compute: Callable[[int, int], Tensor]) -> Tensor:
        """Rows of all samples, each computed by one rank.

        Args:
            n: Samples of all ranks, at least one.
            compute: `(start, stop) -> rows`.

        Returns:
            All rows, shape (n, ...).
        """
        if self.size == 1:
            return compute(0, n)
        start, stop = self.range(n)
        own = compute(start, stop) if stop > start else compute(0, 1)[:0]
        whole = own.new_zeros(n, *own.shape[1:])
        whole[start:stop] = own
        return self.sum(whole)

    def agree(self, name: str, x: Tensor) -> None:
        """Refuse ranks that were given different things.

        Args:
            name: The argument's name, for the message.
            x: What this rank has, of one shape on every rank.

        Raises:
            ValueError: If it differs from the mean over the ranks.
        """
        if self.size == 1:
            return
        mean = self.sum(x.double().clone()) / self.size
        if bool(self.sum(((mean - x).abs() > 1e-6 * mean.abs()).any().double())):
            raise ValueError(f"{name}: expected the same on every rank, got different ones")


ALONE = Ranks()


def all_ranks() -> Ranks:
    """The default process group.

    Returns:
        Its ranks.

    Raises:
        ValueError: If there is none.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("distributed: expected an initialised process group (torchrun, init_process_group), got none")
    return Ranks(dist.get_rank(), dist.get_world_size())


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile, which torch.func cannot differentiate.

    Args:
        model: A model, perhaps wrapped.

    Returns:
        The model itself; parameters are shared.
    """
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = inner
        else:
            return model
