r"""The isotonic calibration layer: a monotone piecewise linear map of the logit, trained inside the network.

The logit y is clipped to [lo, hi] and falls into bucket $k = \min(\lfloor (y - lo) / s \rfloor, K - 1)$ of width s.
With slopes $w_i \ge 0$ and the exclusive prefix sums $c_k = s \sum_{i<k} w_i$,

$$ out = c_k + w_k (y - lo - k s) + b . $$

That is the paper's sum over activations of K buckets in O(1) per row instead of O(K). With a context (device, channel,
position), $w_i = \mathrm{ReLU}(w_i + e_i(context))$ and b has one too. At the start all slopes are 1 and b = lo: the
identity on [lo, hi].

Sources: LiRank, arXiv 2402.06859, section 3.2; context embeddings as in arXiv 2603.06589.
"""

import torch
from core_tensor.checks import check_number, check_tensor
from torch import Tensor, nn
from torch.nn import functional as F


class IsotonicLayer(nn.Module):
    """Calibrate logits.

    Args:
        buckets: Number K of buckets.
        low: Smallest logit of the grid.
        high: Largest logit of the grid.
        contexts: Number of contexts, each with its own curve; 0 for one curve.
    """

    def __init__(self, buckets: int = 100, low: float = -12.0, high: float = 8.0, contexts: int = 0) -> None:
        super().__init__()
        check_number("buckets", buckets, low=1, integer=True)
        check_number("contexts", contexts, low=0, integer=True)
        if not low < high:
            raise ValueError(f"high: expected a value above low = {low}, got {high}")
        self.low, self.high, self.buckets, self.contexts = low, high, buckets, contexts
        self.slope = nn.Parameter(torch.ones(buckets))
        self.bias = nn.Parameter(torch.tensor(float(low)))
        self.context_slope = nn.Parameter(torch.zeros(contexts, buckets)) if contexts else None
        self.context_bias = nn.Parameter(torch.zeros(contexts)) if contexts else None

    @property
    def step(self) -> float:
        """Width s of a bucket."""
        return (self.high - self.low) / self.buckets

    def forward(self, logits: Tensor, context: Tensor | None = None) -> Tensor:
        """Calibrated logits.

        Args:
            logits: Logits y, shape (B,); gradients are zero where they are clipped.
            context: Context of every row, shape (B,), int64; needed exactly if the layer has contexts.

        Returns:
            Calibrated logits, shape (B,).

        Raises:
            ValueError: If the context is missing, not wanted, or out of range.
        """
        if (context is None) != (self.context_slope is None):
            raise ValueError(f"context: expected {'one per row' if self.contexts else 'none'}")
        y = F.hardtanh(logits, self.low, self.high) - self.low
        k = (y.detach() / self.step).int().clamp(0, self.buckets - 1)  # NaN takes any bucket, and stays NaN below
        slope: Tensor
        bias: Tensor
        if context is None or self.context_slope is None or self.context_bias is None:
            slope, bias, place = self.slope.clamp_min(0), self.bias, k
        else:
            if not torch.compiler.is_compiling():  # true while exporting, too
                check_tensor("context", context, shape=tuple(logits.shape), dtype=torch.int64)
                if len(context) and not 0 <= int(context.min()) <= int(context.max()) < self.contexts:
                    raise ValueError(f"context: expected values in [0, {self.contexts})")
            slope = (self.slope + self.context_slope).clamp_min(0)  # (C, K)
            place = context * self.buckets + k
            bias = self.bias + self.context_bias[:, None]
        # the curve at the lower edge of every bucket
        below = torch.add(bias, slope.cumsum(-1) - slope, alpha=self.step)
        # index_select, whose gradient is an index_add: twice as fast as indexing
        below, slope = below.flatten().index_select(0, place), slope.flatten().index_select(0, place)
        return torch.addcmul(below, slope, torch.sub(y, k.to(y.dtype), alpha=self.step))

    @torch.no_grad()
    def set_curve(self, edges: Tensor, values: Tensor, context: int | None = None) -> None:
        """Take over a monotone curve.

        Args:
            edges: Logits, ascending, shape (n,).
            values: Calibrated logits there, non-decreasing, shape (n,); linear between and constant beyond.
            context: Context whose curve it is; None for all of them.

        Raises:
            ValueError: If the curve falls, or there is no such context.
        """
        if context is not None and not 0 <= context < self.contexts:
            raise ValueError(f"context: expected a value in [0, {self.contexts}), got {context}")
        if bool((values.diff() < 0).any()) or bool((edges.diff() < 0).any()):
            raise ValueError("values: expected a curve that never falls over ascending edges")
        grid = torch.linspace(self.low, self.high, self.buckets + 1, dtype=torch.float64)
        right = torch.searchsorted(edges.double(), grid).clamp(1, len(edges) - 1)
        x0, x1 = edges.double()[right - 1], edges.double()[right]
        share = ((grid - x0) / (x1 - x0).clamp_min(1e-12)).clamp(0, 1)
        curve = values.double()[right - 1] * (1 - share) + values.double()[right] * share
        if context is not None and self.context_slope is not None and self.context_bias is not None:
            self.context_slope[context] = curve.diff() / self.step - self.slope
            self.context_bias[context] = curve[0] - self.bias
            return
        self.slope.copy_(curve.diff() / self.step)
        self.bias.copy_(curve[0])
        if self.context_slope is not None and self.context_bias is not None:
            self.context_slope.zero_()
            self.context_bias.zero_()
