"""Generated layers whose weights and inputs resemble those of language models, for benchmarks and claims."""

from dataclasses import dataclass
from typing import Literal

import torch
from core_tensor.checks import check_choice, check_number
from torch import Tensor


@dataclass(frozen=True)
class SyntheticLayer:
    """A weight matrix with the Gram matrices of calibration inputs and of others.

    Attributes:
        weight: W, shape (q, p), float32.
        gram: Of the calibration inputs, shape (p, p), float32.
        heldout: Of as many other inputs, shape (p, p), float32.
    """

    weight: Tensor
    gram: Tensor
    heldout: Tensor


def synthetic_layer(kind: Literal["A", "B"], *, seed: int, features: int = 1024, rows: int = 1024) -> SyntheticLayer:
    r"""Weights with a Student-t distribution and inputs with a power-law spectrum and uneven channels.

    $x = r \odot (G \Lambda^{1/2} \xi)$ with $\xi, G$ standard normal, $\Lambda_{ii} = 1/i$ and log-normal channel
    scales r of spread 0.5. Kind A has 4p tokens, t weights with 5 degrees of freedom and 0.5 % of the channels 20 times
    as large, like the outlier features of language models; kind B has 2p tokens, 30 degrees of freedom and no such
    channels.

    Args:
        kind: `A` or `B`.
        seed: Of the random numbers.
        features: p.
        rows: q.

    Returns:
        The layer.
    """
    check_choice("kind", kind, ("A", "B"))
    check_number("features", features, low=1, integer=True)
    check_number("rows", rows, low=1, integer=True)
    generator = torch.Generator().manual_seed(seed)
    freedom, tokens = (5, 4 * features) if kind == "A" else (30, 2 * features)
    chi = torch.randn(rows, features, freedom, generator=generator).square_().mean(-1).sqrt_()
    weight = torch.randn(rows, features, generator=generator) / chi / features**0.5
    scales = torch.randn(features, generator=generator).mul_(0.5).exp_()
    if kind == "A":
        scales[torch.randperm(features, generator=generator)[: max(1, round(0.005 * features))]] *= 20
    mixing = torch.randn(features, features, generator=generator) * torch.arange(1, features + 1) ** -0.5
    mixing *= scales[:, None]
    grams = []
    for _ in range(2):
        x = mixing @ torch.randn(features, tokens, generator=generator)
        grams.append(x @ x.T)
    return SyntheticLayer(weight, grams[0], grams[1])
