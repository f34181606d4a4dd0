"""Numbers on their way into a network: standardized or made normal, missing ones filled in and marked."""

import torch
from torch import Tensor, nn

from lirank.schema.transforms import KNOTS


class DenseInput(nn.Module):
    """Transforms fitted on training data, as buffers that export with the model.

    Args:
        transforms: `zscore`, `log1p`, `quantile` or `none` for every column.
        mean: Means after log1p, shape (N,).
        deviation: Standard deviations after log1p, shape (N,).
        knots: Quantiles at (i + 1/2) / KNOTS, shape (N, KNOTS).
        missing: Whether a column may be missing (NaN).
    """

    mean: Tensor
    deviation: Tensor
    knots: Tensor
    normal: Tensor
    is_log: Tensor
    is_quantile: Tensor
    is_plain: Tensor

    def __init__(
        self, transforms: list[str], mean: Tensor, deviation: Tensor, knots: Tensor, missing: list[bool]
    ) -> None:
        super().__init__()
        levels = (torch.arange(KNOTS, dtype=torch.float64) + 0.5) / KNOTS
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", deviation.float())
        self.register_buffer("knots", knots.float())
        self.register_buffer("normal", torch.special.ndtri(levels).float())
        for name in ("log1p", "quantile", "none"):
            flag = torch.tensor([t == name for t in transforms], dtype=torch.bool)
            self.register_buffer({"log1p": "is_log", "quantile": "is_quantile", "none": "is_plain"}[name], flag)
        self.may_miss = [j for j, flag in enumerate(missing) if flag]
        self.quantiles = "quantile" in transforms
        self.logs = "log1p" in transforms
        self.width = len(transforms) + len(self.may_miss)

    def forward(self, x: Tensor) -> Tensor:
        """Transform numbers.

        Args:
            x: Numbers as they came, NaN where missing, shape (B, N).

        Returns:
            Inputs, shape (B, N + columns that may be missing): 1 in the latter where a number was missing.
        """
        gone = torch.isnan(x)
        value = torch.where(self.is_log, torch.log1p(torch.where(self.is_log & ~gone, x, 0.0)), x) if self.logs else x
        value = torch.where(gone, self.mean, value)
        found = torch.where(self.is_plain, value, ((value - self.mean) / self.deviation).clamp(-8, 8))
        if self.quantiles:
            found = torch.where(self.is_quantile, self._normal(value), found)
        if self.may_miss:
            found = torch.cat([found, gone[:, self.may_miss].to(found.dtype)], 1)
        return found

    def _normal(self, x: Tensor) -> Tensor:
        right = (x[:, :, None] > self.knots).sum(-1).clamp(1, KNOTS - 1)  # (B, N)
        columns = torch.arange(x.shape[1], device=x.device)
        low, high = self.knots[columns, right - 1], self.knots[columns, right]
        share = ((x - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        return self.normal[right - 1] * (1 - share) + self.normal[right] * share
