r"""The product with a matrix of low rank, one per micro-batch, that is known by its factors.

The rows of x and y are those of n micro-batches of one size, one after the other, and

$$ y_j = b_j + c_j \, (x_j I_j^\top + \beta) \, O_j , $$

that is b, and $x_j E_j$ with $E_j = c_j I_j^\top O_j$, and $\beta \, c_j O_j^\top 1$ for a bias; the matrices $E_j$ are
never formed. A dense product is best added to y afterwards (`y.addmm_(x, W)`): the one that comes second then reads
what the first one left in the cache. Source: the perturbation of SAM and mSAM in a linear layer, whose gradient on a
micro-batch of r rows has rank r (arXiv 2302.09693).
"""

import torch
from torch import Tensor

from core_tensor.checks import check_number, check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.low_rank_add import cpu, reference

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _fake(
    base: Tensor | None, x: Tensor, inner: Tensor, outer: Tensor, coefficient: Tensor, bias: float, out: Tensor
) -> None:
    del base, x, inner, outer, coefficient, bias, out


_low_rank_add = operator(
    "low_rank_add(Tensor? base, Tensor x, Tensor inner, Tensor outer, Tensor coefficient, float bias, Tensor(a!) out)"
    " -> ()",
    reference=reference.low_rank_add,
    fake=_fake,
    cpu=cpu.low_rank_add,
    cuda="core_tensor.ops.low_rank_add.triton:low_rank_add",
)


def low_rank_add(
    base: Tensor | None,
    x: Tensor,
    inner: Tensor,
    outer: Tensor,
    coefficient: Tensor,
    bias: float = 0.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Add to a matrix, to a row that all rows share, or to nothing. No gradient passes.

    Args:
        base: b, shape (n * rows, d_out) or (d_out,), or None for zeros.
        x: Shape (n * rows, d_in), floating, as all others of one dtype; half types go to torch's batched GEMM.
        inner: I, shape (n, r, d_in).
        outer: O, shape (n, r, d_out).
        coefficient: c, shape (n,).
        bias: beta.
        out: Where y is written, shape (n * rows, d_out). It may be b itself, and shares memory with nothing else.

    Returns:
        y, shape (n * rows, d_out).

    Raises:
        ValueError: If shapes or devices do not fit, or entries of `out` share memory with one another.
        TypeError: If dtypes differ, or that of x is not floating.
    """
    try:  # checks that name the argument take as long as a small product, so they run only if something is wrong
        (rows, width), (n, r, out_width) = x.shape, outer.shape
        fits = n > 0 and rows % n == 0 and x.dtype in _FLOATING and coefficient.shape == (n,)
        fits = fits and inner.shape == (n, r, width) and x.dtype is inner.dtype is outer.dtype is coefficient.dtype
        device = x.device
        fits = fits and inner.device == outer.device == coefficient.device == device and type(bias) is float
        fits = fits and x.layout is inner.layout is outer.layout is coefficient.layout is torch.strided
        if base is not None:
            fits = fits and base.dtype is x.dtype and base.shape in {(rows, out_width), (out_width,)}
            fits = fits and base.device == device and base.layout is torch.strided
        y = x.new_empty(rows, out_width) if out is None else out
        if out is not None:
            fits = fits and y.dtype is x.dtype and y.shape == (rows, out_width) and y.device == device
            fits = fits and y.layout is torch.strided and y.is_contiguous() and not y.requires_grad
    except (AttributeError, RuntimeError, TypeError, ValueError):
        fits = False
    if not fits:
        _check(base, x, inner, outer, coefficient, bias, out)
    _low_rank_add(base, x, inner, outer, coefficient, bias, y)
    return y


def _check(
    base: Tensor | None,
    x: Tensor,
    inner: Tensor,
    outer: Tensor,
    coefficient: Tensor,
    bias: float,
    out: Tensor | None,
) -> None:
    check_tensor("x", x, ndim=2, dtype=_FLOATING)
    check_tensor("outer", outer, ndim=3, dtype=x.dtype, device=x.device)
    (rows, width), (n, r, out_width) = x.shape, outer.shape
    if n == 0 or rows % n:
        raise ValueError(f"x: expected rows of {n} micro-batches of one size, as outer has it, got {rows}")
    check_tensor("inner", inner, shape=(n, r, width), dtype=x.dtype, device=x.device)
    check_tensor("coefficient", coefficient, shape=(n,), dtype=x.dtype, device=x.device)
    if base is not None:
        shape = (out_width,) if isinstance(base, Tensor) and base.ndim == 1 else (rows, out_width)
        check_tensor("base", base, shape=shape, dtype=x.dtype, device=x.device)
    if out is not None:
        check_tensor("out", out, shape=(rows, out_width), dtype=x.dtype, device=x.device)
        if any(stride == 0 < size - 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
            raise ValueError(f"out: expected distinct memory for every entry, got strides {out.stride()}")
        if out.is_neg():
            raise ValueError("out: expected a tensor that can be written to, got a negated view")
        if out.requires_grad:
            raise ValueError("out: expected a tensor that needs no gradient, since none passes")
    check_number("bias", bias)
