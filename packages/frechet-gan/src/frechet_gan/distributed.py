"""The few collectives that exact distributed losses need; all of them do nothing without a process group."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> tuple[int, int]:
    """Rank and number of processes.

    Returns:
        (rank, world size); (0, 1) without a process group.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@torch.no_grad()
def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Rows of every rank, in the order of the ranks; ranks may hold different numbers of rows.

    Args:
        x: Local rows, shape (n, d).

    Returns:
        All rows, shape (n_total, d), and the index of this rank's first row. No gradient passes.
    """
    rank, size = world()
    x = x.detach()
    if size == 1:
        return x, 0
    counts = torch.zeros(size, dtype=torch.int64, device=x.device)
    counts[rank] = x.shape[0]
    dist.all_reduce(counts)
    rows = counts.tolist()
    padded = x.new_zeros(max(rows), x.shape[1])
    padded[: x.shape[0]] = x
    pieces = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(pieces, padded)
    return torch.cat([piece[:n] for piece, n in zip(pieces, rows, strict=True)]), sum(rows[:rank])


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average gradients over the ranks, as DistributedDataParallel does; works with second derivatives too.

    Args:
        parameters: Parameters; those without a gradient are passed over (the same ones on every rank).
    """
    _, size = world()
    if size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= size
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


@torch.no_grad()
def broadcast_module(module: torch.nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0.

    Args:
        module: Module.
    """
    _, size = world()
    if size > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)
