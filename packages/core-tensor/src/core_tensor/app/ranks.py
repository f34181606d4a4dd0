"""The processes that share a job: who this one is, and the few collectives that exact results need.

Every method does its job without a process group too, so that callers have one code path. Torch is imported when a
method needs it.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Who takes part.

    Attributes:
        rank: This process.
        size: Number of processes.
        group: The process group; None is torch's default one.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    def range(self, n: int) -> tuple[int, int]:
        """This rank's share of n items.

        Args:
            n: Items of all ranks.

        Returns:
            The first, and one past the last.
        """
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier(self.group)

    def share(self, value: T) -> T:
        """What rank 0 has.

        Args:
            value: Any picklable object; ignored on other ranks.

        Returns:
            Rank 0's value.
        """
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        """What every rank has.

        Args:
            value: Any picklable object.

        Returns:
            The values, by rank.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, x: "Tensor") -> "Tensor":
        """Sum over the ranks, in place.

        Args:
            x: Of one shape on every rank.

        Returns:
            The sum.
        """
        if self.size > 1:
            import torch.distributed as dist

            # nccl knows no tensors of the CPU
            shared = x.cuda() if x.device.type == "cpu" and dist.get_backend(self.group) == "nccl" else x
            dist.all_reduce(shared, group=self.group)
            if shared is not x:
                x.copy_(shared)
        return x

    def rows(self, n: int, compute: "Callable[[int, int], Tensor]") -> "Tensor":
        """Rows of all items, each computed by one rank.

        Args:
            n: Items of all ranks, at least one.
            compute: `(start, stop) -> rows`.

        Returns:
            All rows, shape (n, ...).
        """
        if self.size == 1:
            return compute(0, n)
        start, stop = self.range(n)
        own = compute(start, stop) if stop > start else compute(0, 1)[:0]
        all_rows = own.new_zeros(n, *own.shape[1:])
        all_rows[start:stop] = own
        return self.sum(all_rows)

    def gather_rows(self, x: "Tensor") -> "tuple[Tensor, int]":
        """Rows of every rank, in the order of the ranks, which may hold different numbers of them.

        Args:
            x: Local rows, shape (n, ...).

        Returns:
            All rows, shape (n_total, ...), and the index of this rank's first row. No gradient passes.
        """
        x = x.detach()
        if self.size == 1:
            return x, 0
        counts = self.gather(x.shape[0])
        start = sum(counts[: self.rank])
        all_rows = x.new_zeros(sum(counts), *x.shape[1:])
        all_rows[start : start + x.shape[0]] = x
        return self.sum(all_rows), start

    def agree(self, name: str, x: "Tensor") -> None:
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

    def broadcast_module(self, module: "torch.nn.Module") -> None:
        """Give every rank the parameters and buffers of rank 0.

        Args:
            module: Module of the same shapes on every rank.
        """
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.data, 0, group=self.group)

    def average_gradients(self, parameters: "Iterable[torch.nn.Parameter]") -> None:
        """Average gradients over the ranks, as DistributedDataParallel does; works with second derivatives too.

        Args:
            parameters: Parameters; those without a gradient are passed over (the same ones on every rank).
        """
        if self.size == 1:
            return
        import torch

        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        with torch.no_grad():
            flat = self.sum(torch.cat([g.flatten() for g in gradients])) / self.size
            for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(piece.view_as(gradient))


ALONE = Ranks()
"""One process."""


def current(group: Any = None) -> Ranks:
    """The ranks of a process group.

    Args:
        group: The group; None for the default one.

    Returns:
        The ranks; `ALONE` where no process group was started.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Ranks(dist.get_rank(group), dist.get_world_size(group), group)


@contextmanager
def join(device: str = "cpu") -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, if it did, and leave them at the end.

    Args:
        device: Where the tensors are that will be shared: gloo serves the CPU, NCCL serves CUDA.

    Yields:
        The ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield current()
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield current()
    finally:
        dist.destroy_process_group()
