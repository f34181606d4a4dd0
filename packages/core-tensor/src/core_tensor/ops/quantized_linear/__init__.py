r"""Product with a weight matrix of packed codes and sparse outliers, without storing the weights unpacked.

$$ y_{ti} = \sum_j x_{tj} \, s_{i g(j)} (c_{ij} - z_{i g(j)}) + \sum_{(i, j) \in H} x_{tj} h_{ij}, \qquad
g(j) = \lfloor j / \text{group size} \rfloor, $$

with codes $c$ packed as in `core_tensor.pack_bits` and outliers $H$ in compressed sparse rows. The gradient with
respect to $x$ is $\partial x_t = \partial y_t \hat W$; codes, scales and outliers are constants.
"""

from typing import Any

import torch
from torch import Tensor

from core_tensor.checks import check_choice, check_number, check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.quantized_linear import cpu, reference


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

    Returns:
        Outputs, shape (..., q), in the dtype of `x`.

    Raises:
        ValueError: If shapes do not fit.
        TypeError: If a dtype is not supported.
    """
    check_tensor("x", x, dtype=(torch.float32, torch.float16, torch.bfloat16))
    check_choice("bits", bits, range(1, 9))
    check_number("group_size", group_size, low=-1, integer=True)
    features = x.shape[-1]
    size = features if group_size == -1 else group_size
    if group_size != -1 and (group_size == 0 or group_size % 8):
        raise ValueError(f"group_size: expected -1 or a multiple of 8, got {group_size}")
    check_tensor("words", words, shape=(None, -(-features * bits // 32)), dtype=torch.int32)
    rows = words.shape[0]
    groups = max(1, -(-features // size)) if size else 1
    check_tensor("scale", scale, shape=(rows, groups), dtype=(torch.float32, torch.float16, torch.bfloat16))
    check_tensor("zero", zero, shape=(rows, groups), dtype=torch.uint8)
    if outliers is not None:
        check_tensor("outliers[0]", outliers[0], shape=(rows + 1,), dtype=torch.int64)
        check_tensor("outliers[1]", outliers[1], ndim=1, dtype=torch.int32)
        check_tensor("outliers[2]", outliers[2], shape=tuple(outliers[1].shape))
    flat = x.reshape(-1, features)
    y: Tensor = _quantized_linear(flat, words, scale, zero, bits, size, *(outliers or (None, None, None)))
    return y.reshape(*x.shape[:-1], rows)
