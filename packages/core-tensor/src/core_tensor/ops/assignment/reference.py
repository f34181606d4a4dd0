"""Plain torch: one shortest augmenting path for every row, by Dijkstra's algorithm on reduced costs."""

import torch
from torch import Tensor


def assignment(cost: Tensor) -> Tensor:
    """See `core_tensor.assignment`."""
    return torch.stack([_solve(matrix) for matrix in cost])


def _solve(cost: Tensor) -> Tensor:
    n = cost.shape[0]
    price = cost.new_zeros(n)
    row, column = [-1] * n, [-1] * n
    for start in range(n):
        distance = torch.full_like(price, torch.inf)
        origin = torch.full((n,), -1, device=cost.device)
        done = torch.zeros(n, dtype=torch.bool, device=cost.device)
        i, base = start, cost.new_zeros(())
        while True:
            through = base + (cost[i] - price)
            better = (through < distance) & ~done
            distance, origin = torch.where(better, through, distance), torch.where(better, i, origin)
            j = int(torch.where(done, torch.inf, distance).argmin())
            if row[j] < 0:
                break
            done[j] = True
            i = row[j]
            base = distance[j] - (cost[i, j] - price[j])
        price = price + torch.where(done, distance - distance[j], 0.0)
        while True:
            i = int(origin[j])
            row[j], column[i], j = i, j, column[i]
            if i == start:
                break
    return torch.tensor(column, device=cost.device)
