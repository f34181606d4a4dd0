"""Gram matrices of a layer's inputs, accumulated in token folds, and their shrinkage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from core_tensor.checks import check_choice, check_number, check_tensor
from torch import Tensor

Target = Literal["diagonal", "identity"]


@dataclass(frozen=True)
class Shrinkage:
    r"""A convex combination of a Gram matrix with a diagonal target of the same trace.

    $$ \Sigma_t = (1 - t)\,\Sigma + t\,T, \qquad
    T = \operatorname{diag}(\Sigma) \;\text{(`diagonal`)} \quad\text{or}\quad
    T = \tfrac1p \operatorname{tr}(\Sigma)\, I \;\text{(`identity`)}. $$

    Attributes:
        strength: $t$ in [0, 1]; 0 leaves the matrix as it is.
        target: Which $T$.
    """

    strength: float = 0.0
    target: Target = "diagonal"

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0.0, high=1.0)
        check_choice("target", self.target, ("diagonal", "identity"))

    def __call__(self, sigma: Tensor) -> Tensor:
        """Shrink a Gram matrix.

        Args:
            sigma: Gram matrix, shape (p, p).

        Returns:
            A new matrix, shape (p, p); with `strength` 0 the same values.
        """
        shrunk = sigma * (1 - self.strength)
        diagonal = sigma.diagonal()
        target = diagonal if self.target == "diagonal" else diagonal.mean().expand_as(diagonal)
        shrunk.diagonal().add_(target, alpha=self.strength)
        return shrunk


class GramFolds:
    r"""Accumulates $\Sigma = \sum_t x_t x_t^\top$ over the tokens a layer sees, in several folds of tokens.

    Token number $t$ of the whole stream belongs to fold $\lfloor t / \text{segment} \rfloor \bmod \text{folds}$, so
    the folds depend on the tokens alone, not on how they are cut into batches. Keeping folds apart costs
    `folds` matrices instead of one and lets `quantize_layer` choose the shrinkage on tokens that were held out.

    Args:
        features: $p$, the layer's number of inputs.
        folds: Number of folds, at least 1; held-out choices need 2 or more.
        segment: Consecutive tokens that stay in one fold; neighbours in a text are alike, so longer is more honest.
            With tokens in windows, give a window's length: the first tokens of a window are unlike the others.
        dtype: Accumulator, float32 or float64; with float64 the sum hardly depends on the order of the tokens.
        products: Dtype in which batches are multiplied; None is that of the accumulator.
        first: Number of the first token in the stream, where other processes accumulate those before it.
        device: Where the accumulators live.
    """

    def __init__(
        self,
        features: int,
        *,
        folds: int = 2,
        segment: int = 256,
        dtype: torch.dtype = torch.float32,
        products: torch.dtype | None = None,
        first: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        check_number("features", features, low=1, integer=True)
        check_number("folds", folds, low=1, integer=True)
        check_number("segment", segment, low=1, integer=True)
        check_choice("dtype", dtype, (torch.float32, torch.float64))
        check_number("first", first, low=0, integer=True)
        self.segment, self.first, self.products = segment, first, products or dtype
        self.folds = torch.zeros(folds, features, features, dtype=dtype, device=device)  # (F, p, p)
        self.counts = torch.zeros(folds, dtype=torch.int64)  # tokens per fold, (F,)
        self.cross: dict[str, Tensor] = {}  # products with other signals of the same tokens, each (F, p, k)

    @property
    def features(self) -> int:
        """Number of inputs $p$."""
        return self.folds.shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens seen."""
        return int(self.counts.sum())

    @property
    def total(self) -> Tensor:
        """Gram matrix of all tokens, shape (p, p)."""
        return self.folds.sum(0)

    def update(self, x: Tensor, beside: Mapping[str, Tensor] | None = None) -> None:
        r"""Add tokens.

        Args:
            x: Layer inputs, shape (tokens, p) or (..., p), floating point.
            beside: Other signals R of the same tokens by name, each of shape (..., k): $X^\top R$ is accumulated in
                `cross`, in the same folds.

        Raises:
            ValueError: If the last dimension is not p, or a value is not finite.
        """
        check_tensor("x", x)
        if x.ndim < 1 or x.shape[-1] != self.features:
            raise ValueError(f"x: expected shape (tokens, {self.features}), got {tuple(x.shape)}")
        check_tensor("x", x, finite=True)
        rows = x.detach().reshape(-1, self.features)
        signals = {name: value.detach().reshape(-1, value.shape[-1]) for name, value in (beside or {}).items()}
        for name, value in signals.items():
            if name not in self.cross:
                self.cross[name] = self.folds.new_zeros(len(self.counts), self.features, value.shape[1])
        start = 0
        while start < rows.shape[0]:
            seen = self.first + self.tokens
            stop = min(start + self.segment - seen % self.segment, rows.shape[0])
            fold = seen // self.segment % len(self.counts)
            part = rows[start:stop].to(self.folds.device, self.products)
            self.folds[fold] += part.T @ part
            for name, value in signals.items():
                self.cross[name][fold] += part.T @ value[start:stop].to(part)
            self.counts[fold] += part.shape[0]
            start = stop

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `load_state_dict` takes, for checkpoints.

        Returns:
            `{"folds": (F, p, p), "counts": (F,)}`.
        """
        return {"folds": self.folds, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint.

        Args:
            state: What `state_dict` returned, of the same shape.
        """
        check_tensor("state['folds']", state["folds"], shape=tuple(self.folds.shape))
        check_tensor("state['counts']", state["counts"], shape=tuple(self.counts.shape), dtype=torch.int64)
        self.folds.copy_(state["folds"])
        self.counts.copy_(state["counts"])


def oas(gram: GramFolds) -> Shrinkage:
    r"""Oracle-approximating shrinkage towards a multiple of the identity, in closed form.

    $$ t = \min\Bigl(1, \frac{(1 - 2/p) \operatorname{tr} S^2 + \operatorname{tr}^2 S}
    {(n + 1 - 2/p)(\operatorname{tr} S^2 - \operatorname{tr}^2 S / p)}\Bigr), \quad S = \Sigma / n. $$

    Args:
        gram: Accumulated Gram matrix and its number of tokens $n$.

    Returns:
        The shrinkage.

    Source: Chen, Wiesel, Eldar, Hero, "Shrinkage algorithms for MMSE covariance estimation", 2010, Eq. 23.
    """
    n, p = gram.tokens, gram.features
    if n == 0:
        return Shrinkage(0.0, "identity")
    S = gram.total.double() / n
    square, trace = float(S.square().sum()), float(S.diagonal().sum())
    spread = (n + 1 - 2 / p) * (square - trace**2 / p)
    strength = 1.0 if spread <= 0 else min(1.0, ((1 - 2 / p) * square + trace**2) / spread)
    return Shrinkage(strength, "identity")
