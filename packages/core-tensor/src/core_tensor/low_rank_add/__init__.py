r"""Adds the product with a matrix of low rank, one per micro-batch, that is known by its factors.

The rows of y and x are those of n micro-batches of one size, one after the other, and

$$ y_j \leftarrow y_j + c_j \, (x_j I_j^\top + \beta) \, O_j , $$

which is $x_j E_j$ with $E_j = c_j I_j^\top O_j$, and $\beta \, c_j O_j^\top 1$ beside it for a bias; the matrices
$E_j$ are never formed. Source: the perturbation of SAM and mSAM in a linear layer, whose gradient on a micro-batch of
r rows has rank r (arXiv 2302.09693).
"""

import torch
from torch import Tensor

from core_tensor._operator import operator
from core_tensor.checks import check_tensor
from core_tensor.low_rank_add import cpu, reference

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _fake(y: Tensor, x: Tensor, inner: Tensor, outer: Tensor, coefficient: Tensor, bias: float) -> None:
    del y, x, inner, outer, coefficient, bias


_low_rank_add = operator(
    "low_rank_add_(Tensor(a!) y, Tensor x, Tensor inner, Tensor outer, Tensor coefficient, float bias) -> ()",
    reference=reference.low_rank_add_,
    fake=_fake,
    cpu=cpu.low_rank_add_,
)


def low_rank_add_(y: Tensor, x: Tensor, inner: Tensor, outer: Tensor, coefficient: Tensor, bias: float = 0.0) -> Tensor:
    """Add to y in place. No gradient passes.

    Args:
        y: What is added to, shape (n * rows, d_out), floating; half types go to torch's batched GEMM.
        x: Shape (n * rows, d_in), as all that follow of the dtype of y.
        inner: I, shape (n, r, d_in).
        outer: O, shape (n, r, d_out).
        coefficient: c, shape (n,).
        bias: beta.

    Returns:
        y.

    Raises:
        ValueError: If shapes do not fit.
        TypeError: If dtypes differ, or that of y is not floating.
    """
    try:  # checks that name the argument take as long as a small product, so they run only if something is wrong
        (rows, out_width), (n, r, width) = y.shape, inner.shape
        fits = n > 0 and rows % n == 0 and y.dtype in _FLOATING and coefficient.shape == (n,)
        fits = fits and x.shape == (rows, width) and outer.shape == (n, r, out_width)
        fits = fits and x.dtype is inner.dtype is outer.dtype is coefficient.dtype is y.dtype
    except (AttributeError, TypeError, ValueError):
        fits = False
    if not fits:
        _check(y, x, inner, outer, coefficient)
    _low_rank_add(y, x, inner, outer, coefficient, bias)
    return y


def _check(y: Tensor, x: Tensor, inner: Tensor, outer: Tensor, coefficient: Tensor) -> None:
    check_tensor("y", y, ndim=2, dtype=_FLOATING)
    check_tensor("inner", inner, ndim=3, dtype=y.dtype)
    (rows, out_width), (n, r, width) = y.shape, inner.shape
    if n == 0 or rows % n:
        raise ValueError(f"y: expected rows of {n} micro-batches of one size, as inner has it, got {rows}")
    check_tensor("x", x, shape=(rows, width), dtype=y.dtype)
    check_tensor("outer", outer, shape=(n, r, out_width), dtype=y.dtype)
    check_tensor("coefficient", coefficient, shape=(n,), dtype=y.dtype)
