"""The yardstick: one dual evaluation by vectorised torch, blocks bucketed by length, simplices projected by sorting."""

import torch
from core_tensor import BlockData
from torch import Tensor


class BucketedDual:
    """Blocks of similar length padded to one width.

    Args:
        data: Simplex blocks with one row per variable.
        rows: Number of rows.
        doubling: Whether widths double from bucket to bucket, as DuaLip 5 lays them out (1.37 times as many entries as
            variables on the benchmark's instance); otherwise every even width has a bucket (1.05 times).
    """

    def __init__(self, data: BlockData, rows: int, *, doubling: bool) -> None:
        lengths = data.offsets[1:] - data.offsets[:-1]
        a = torch.ones_like(data.cost) if data.coefficient is None else data.coefficient
        self.rows, self.buckets = rows, []
        widths = 2 ** torch.log2(lengths.clamp_min(1)).ceil().long() if doubling else (lengths + 1) // 2 * 2
        for width in widths.unique().tolist():
            blocks = torch.nonzero(widths == width).ravel()
            at = data.offsets[blocks, None] + torch.arange(width)
            inside = torch.arange(width) < lengths[blocks, None]
            at = torch.where(inside, at, 0)
            cost = torch.where(inside, data.cost[at], torch.inf)
            cap = data.cap.expand(data.blocks)[blocks].float()[:, None]
            self.buckets.append((data.index[at].long(), cost, torch.where(inside, a[at], 0.0), cap))

    def evaluate(self, lam: Tensor, gamma: float) -> tuple[float, Tensor]:
        """Smoothed dual without its term in the budgets, and A x.

        Args:
            lam: Multipliers, shape (rows,), float32.
            gamma: Weight of the ridge.

        Returns:
            The value and the load, shape (rows,).
        """
        load, value = torch.zeros(self.rows), 0.0
        for index, cost, a, cap in self.buckets:
            reduced = cost + a * lam[index]
            x = _simplex(-reduced / gamma, cap)
            load.scatter_add_(0, index.ravel(), (a * x).ravel())
            value += float((torch.where(x > 0, reduced, 0.0) * x + gamma / 2 * x * x).sum())
        return value, load


def _simplex(v: Tensor, cap: Tensor) -> Tensor:
    # Projection of every row onto {x >= 0, 1'x <= cap}: sort, running sums, threshold.
    v = v.clamp_min(-3e38)
    ordered = torch.sort(v, dim=1, descending=True).values
    excess = ordered.cumsum(1) - cap
    count = torch.arange(1, v.shape[1] + 1, dtype=v.dtype)
    rho = (ordered * count > excess).sum(1, keepdim=True).clamp_min(1)
    theta = (excess.gather(1, rho - 1) / rho).clamp_min(0)
    return (v - theta).clamp_min(0)
