r"""Targets of a layer that sits behind quantized layers: weights whose outputs come nearest to full precision's.

Behind quantized layers the inputs X of a layer are no longer those it was trained with, $X_\text{fp}$, and quantizing
W towards $W X$ passes the difference on. What is wanted instead is $\hat W$ with $X \hat W^\top \approx Z_\text{fp}$,
where Z is the layer's output at full precision, or the residual stream once that output was added to it. With
$R = Z_\text{fp} - Z$, the difference while this layer is still at full precision, least squares asks for the shift

$$ \Delta(S, B) = (1 - t)\,(S_t^{-1} B)^\top, \qquad S = X^\top X,\; B = X^\top R,\; S_t = (1 - t) S + t
\operatorname{diag} S. $$

How much of it holds on other tokens is measured on those: with $\Delta_{-f}$ fitted on all folds but f,

$$ c = \operatorname{clip}\Bigl(\frac{\sum_f \langle \Delta_{-f}^\top, B_f \rangle}{\sum_f \langle \Delta_{-f} S_f,
\Delta_{-f} \rangle},\, 0,\, 1\Bigr), \qquad \tilde W = W + c\,\Delta\bigl(\textstyle\sum_f S_f, \sum_f B_f\bigr). $$

A column of a shift is at most ten times as long as the weights' own column or their average one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.3
"""t: 0.2 to 0.45 are equally good on SmolLM2 at 2 and 3 bits."""
LONGEST = 10.0
"""Columns of a shift over those of the weights, at most; up to 6 they helped in the first blocks of SmolLM2."""


@dataclass(frozen=True)
class Targets:
    r"""What the matrices of one input group are quantized towards.

    Attributes:
        weights: $\tilde W$ by name, each of shape (q, p), float32.
        factor: c, in [0, 1]; 0 leaves every target at its W.
    """

    weights: dict[str, Tensor]
    factor: float


def shifted_targets(weights: Mapping[str, Tensor], grams: Tensor, pulls: Mapping[str, Tensor]) -> Targets:
    r"""Targets of matrices that read the same inputs, with one factor for all of them.

    Args:
        weights: W by name, each of shape (q, p).
        grams: $S_f$, shape (F, p, p); folds without tokens are zero.
        pulls: $B_f$ by name, each of shape (F, p, q).

    Returns:
        The targets; W itself where fewer than two folds have tokens, or nothing differs from full precision.
    """
    names = list(weights)
    W = {name: weights[name].detach().float() for name in names}
    stacked = torch.cat(list(W.values()))  # (Q, p)
    S, B = grams.float(), torch.cat([pulls[name].float() for name in names], dim=2)  # (F, p, p), (F, p, Q)
    filled = [f for f in range(len(S)) if bool(S[f].diagonal().any())]
    if len(filled) < 2 or not bool(B.any()):
        return Targets(W, 0.0)
    total_S, total_B = S.sum(0), B.sum(0)

    # 1. how much of the other folds' shift each fold confirms
    agreement, size = 0.0, 0.0
    for f in filled:
        delta = _bounded(least_squares_shift(total_S - S[f], total_B - B[f]), stacked)
        agreement += float(torch.sum(delta.T * B[f], dtype=torch.float64))
        size += float(torch.sum((delta @ S[f]) * delta, dtype=torch.float64))
    factor = min(max(agreement / size, 0.0), 1.0) if size > 0 else 0.0
    if factor == 0.0:
        return Targets(W, 0.0)

    # 2. that part of the shift that all folds ask for
    delta = _bounded(least_squares_shift(total_S, total_B), stacked).mul_(factor)
    parts = delta.split([W[name].shape[0] for name in names])
    return Targets({name: W[name] + part for name, part in zip(names, parts, strict=True)}, factor)


def _bounded(delta: Tensor, weights: Tensor) -> Tensor:
    """The shift, with columns at most so many times as long as the weights' own, or as these on average."""
    # a feature that quantization has all but silenced asks for any weight: what is owed to it, over next to nothing
    own = weights.norm(dim=0)
    most = LONGEST * own.clamp_min(float(own.square().mean().sqrt()))
    share: Tensor = (most / delta.norm(dim=0).clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1.0)
    return delta * share


def least_squares_shift(gram: Tensor, pull: Tensor, ridge: float = RIDGE) -> Tensor:
    r"""$\Delta(S, B) = (1 - t)(S_t^{-1} B)^\top$, by a Cholesky factor of $S_t$ scaled to a unit diagonal.

    Args:
        gram: S, shape (p, p).
        pull: B, shape (p, q).
        ridge: t.

    Returns:
        Shape (q, p); zero columns for dead features.
    """
    diagonal = gram.diagonal()
    live = diagonal > 0
    unit = torch.where(live, diagonal, 1.0).rsqrt()  # D^-1/2
    scaled = gram * unit[:, None] * unit * (1 - ridge)
    scaled.diagonal().fill_(1.0)
    L = torch.linalg.cholesky(scaled)
    solved: Tensor = torch.cholesky_solve(pull * (unit * live)[:, None], L)
    return (solved * (unit * live * (1 - ridge))[:, None]).T
