r"""Norms of per-example or per-micro-batch gradients from their factors, without forming the gradients.

A linear layer's gradient on micro-batch j is $g_j = L_j^\top R_j$ with the output gradients L_j and the inputs R_j of
its r rows, and its bias has $L_j^\top 1$. With one more input that is always 1 for the bias ($\beta = 1$, else 0),

$$ \lVert g_j \rVert^2 = \sum_{layers} \sum_{a, b} (L_j L_j^\top)_{ab} \, (R_j R_j^\top + \beta)_{ab} , $$

which costs r (d_0 + d_1) per row instead of d_0 d_1. Source: the "ghost norm" of Li, Tramèr, Liang and Hashimoto,
arXiv 2110.05679, section 4; for one row per example Goodfellow, arXiv 1510.01799.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core_tensor.checks import check_number, check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.ghost_norms import cpu, reference

_SINGLE_OR_DOUBLE = (torch.float32, torch.float64)


def _fake(left: list[Tensor], right: list[Tensor], bias: list[float]) -> Tensor:
    del right, bias
    return left[0].new_empty(left[0].shape[0], dtype=torch.float64)


_ghost_norms = operator(
    "ghost_norms(Tensor[] left, Tensor[] right, float[] bias) -> Tensor",
    reference=reference.ghost_norms,
    fake=_fake,
    cpu=cpu.ghost_norms,
    cuda="core_tensor.ops.ghost_norms.triton:ghost_norms",
)


def ghost_norms(left: Sequence[Tensor], right: Sequence[Tensor], bias: Sequence[float]) -> Tensor:
    """Squared norm of every micro-batch's gradient over all layers.

    Args:
        left: L of every layer, shape (n, r, d_0) each, float32 or float64; r and d_0 are the layer's own.
        right: R of every layer, shape (n, r, d_1), of the same dtype as L.
        bias: beta of every layer: 1 if its bias counts, 0 if not, or the square of another weight.

    Returns:
        Squared norms, shape (n,), float64. No gradient passes.

    Raises:
        ValueError: If the lists differ in length or are empty, or shapes or devices do not fit.
        TypeError: If dtypes differ or are neither float32 nor float64.
    """
    lists = (left, right, bias)
    if not all(isinstance(given, (list, tuple)) for given in lists) or not 0 < len(left) == len(right) == len(bias):
        counts = ", ".join(str(len(given)) if isinstance(given, (list, tuple)) else "no list" for given in lists)
        raise ValueError(f"left: expected as many layers as in right and bias, at least one, got {counts}")
    check_tensor("left", left[0], ndim=3)
    n, device = left[0].shape[0], left[0].device
    for a, b, beta in zip(left, right, bias, strict=True):
        try:  # checks that name the argument take as long as a small layer, so they run only if something is wrong
            (a_n, a_rows, a_width), (b_n, b_rows, b_width) = a.shape, b.shape
            fits = a_n == b_n == n and a_rows == b_rows and a.dtype is b.dtype and a.dtype in _SINGLE_OR_DOUBLE
            fits = fits and a_n * a_rows * a_width * b_width > 0 and a.device == b.device == device
            fits = fits and a.layout is b.layout is torch.strided and type(beta) is float
        except (AttributeError, RuntimeError, TypeError, ValueError):
            fits = False
        if not fits:
            check_tensor("left", a, shape=(n, None, None), dtype=_SINGLE_OR_DOUBLE, device=device, nonempty=True)
            check_tensor("right", b, shape=(n, a.shape[1], None), dtype=a.dtype, device=device, nonempty=True)
            check_number("bias", beta)
    squares: Tensor = _ghost_norms(list(left), list(right), list(bias))
    return squares
