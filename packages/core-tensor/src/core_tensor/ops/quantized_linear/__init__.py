r"""Product with a weight matrix of packed codes and sparse outliers, without storing the weights unpacked.

$$ y_{ti} = \sum_j x_{tj} \, s_{i g(j)} (c_{ij} - z_{i g(j)}) + \sum_{(i, j) \in H} x_{tj} h_{ij}, \qquad
g(j) = \lfloor j / \text{group size} \rfloor, $$

with codes $c$ packed as in `core_tensor.pack_bits` and outliers $H$ in compressed sparse rows. The gradient with
respect to $x$ is $\partial x_t = \partial y_t \hat W$; codes, scales and outliers are constants.
"""

import math
from typing import Any

import torch
from torch import Tensor

from core_tensor.checks import check_flag, check_number, check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.quantized_linear import cpu, reference

_SCALES = (torch.float32, torch.float16, torch.bfloat16)
_VALUES = (*_SCALES, torch.float64)


def _fake(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    offsets: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
) -> Tensor:
    return x.new_empty((x.shape[0], words.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *tensors = inputs
    ctx.features = x.shape[1]
    ctx.scalars = tensors[3:5]
    ctx.save_for_backward(*tensors[:3], *tensors[5:])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    words, scale, zero, offsets, columns, values = ctx.saved_tensors
    bits, group_size = ctx.scalars
    weight = reference.dequantize(words, scale, zero, bits, group_size, ctx.features, offsets, columns, values)
    return gradient @ weight.to(gradient.dtype), *(None,) * 8


_quantized_linear = operator(
    "quantized_linear(Tensor x, Tensor words, Tensor scale, Tensor zero, int bits, int group_size, Tensor? offsets,"
    " Tensor? columns, Tensor? values) -> Tensor",
    reference=reference.quantized_linear,
    fake=_fake,
    cpu=cpu.quantized_linear,
    cuda="core_tensor.ops.quantized_linear.triton:quantized_linear",
    setup_context=_setup_context,
    backward=_backward,
)


def quantized_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int = -1,
    outliers: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    check: bool = True,
) -> Tensor:
    """Apply a quantized linear map; differentiable in `x`.

    Args:
        x: Inputs, shape (..., p), float32, float16 or bfloat16. Sums run in float32.
        words: Packed codes, shape (q, ceil(p * bits / 32)), int32, from `pack_bits`.
        scale: Grid steps, shape (q, G), floating.
        zero: Zero points, shape (q, G), uint8.
        bits: Bits per code, 1 to 8.
        group_size: Consecutive inputs that share a scale, a multiple of 8; -1 for one scale per row.
        outliers: Row offsets (q + 1,) int64, columns (nnz,) int32 and values (nnz,) floating, or None.
        check: Whether the positions of outliers are checked on CUDA, which waits for the device; a layer that has
            called `check_weights` when it was loaded passes False. On CPUs they are checked as they are read.

    Returns:
        Outputs, shape (..., q), in the dtype of `x`.

    Raises:
        ValueError: If shapes or devices do not fit, a number is out of range, or an outlier is outside the matrix.
        TypeError: If a dtype is not supported.
    """
    check_tensor("x", x, dtype=(torch.float32, torch.float16, torch.bfloat16))
    if x.ndim == 0:
        raise ValueError("x: expected at least one dimension, got a number")
    features = x.shape[-1]
    _check_layout(features, words, scale, zero, bits, group_size, outliers)
    check_tensor("x", x, device=words.device)
    check_flag("check", check)
    if check and outliers is not None and not x.is_cpu:
        reference.check_outliers(outliers[0], outliers[1], features)
    size = features if group_size == -1 else min(group_size, features)
    flat = x.reshape(math.prod(x.shape[:-1]), features)
    y: Tensor = _quantized_linear(flat, words, scale, zero, bits, size, *(outliers or (None, None, None)))
    return y.reshape(*x.shape[:-1], words.shape[0])


def check_weights(
    features: int,
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int = -1,
    outliers: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Refuse weights that `quantized_linear` cannot apply; a layer calls it when it has loaded them from a file.

    Args:
        features: Inputs p.
        words: Packed codes, as in `quantized_linear`.
        scale: Grid steps.
        zero: Zero points.
        bits: Bits per code.
        group_size: Consecutive inputs that share a scale.
        outliers: Row offsets, columns and values, or None.

    Raises:
        ValueError: If shapes or devices do not fit, a number is out of range, or an outlier is outside the matrix.
        TypeError: If a dtype is not supported.
    """
    check_number("features", features, low=0, integer=True)
    _check_layout(features, words, scale, zero, bits, group_size, outliers)
    if outliers is not None:
        reference.check_outliers(outliers[0], outliers[1], features)


def _check_layout(
    features: int,
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    outliers: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Everything about the weights that shows without reading them."""
    check_number("bits", bits, low=1, high=8, integer=True)
    check_number("group_size", group_size, low=-1, integer=True)
    if group_size != -1 and (group_size == 0 or group_size % 8):
        raise ValueError(f"group_size: expected -1 or a multiple of 8, got {group_size}")
    check_tensor("words", words, shape=(None, -(-features * bits // 32)), dtype=torch.int32)
    rows, device = words.shape[0], words.device
    groups = 1 if group_size == -1 else max(1, -(-features // group_size))
    check_tensor("scale", scale, shape=(rows, groups), dtype=_SCALES, device=device)
    check_tensor("zero", zero, shape=(rows, groups), dtype=torch.uint8, device=device)
    if outliers is not None:
        if not isinstance(outliers, tuple) or len(outliers) != 3:
            raise TypeError("outliers: expected a tuple of offsets, columns and values, or None")
        offsets, columns, values = outliers
        check_tensor("outliers[0]", offsets, shape=(rows + 1,), dtype=torch.int64, device=device)
        check_tensor("outliers[1]", columns, ndim=1, dtype=torch.int32, device=device)
        check_tensor("outliers[2]", values, shape=tuple(columns.shape), dtype=_VALUES, device=device)
