"""Calls into `csrc/quantized_linear.cpp`: fused for few tokens, dequantize and GEMM for many."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function
from core_tensor.ops.quantized_linear import reference

_gemv = function("ct_quantized_gemv", *[c_void_p] * 6, *[c_int64] * 6, c_int)
_dequantize_rows = function("ct_dequantize_rows", *[c_void_p] * 4, *[c_int64] * 5, c_int)
_add_outliers = function("ct_add_outliers", *[c_void_p] * 5, *[c_int64] * 4, returns=c_int)

FEW_TOKENS = 8
"""Up to here the weights are unpacked in registers and never written."""

_BUFFER_BYTES = 1 << 21  # of dequantized rows, about a second-level cache


def quantized_linear(
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
    """See `core_tensor.quantized_linear`."""
    inputs = x.float().contiguous()
    words, scale, zero = words.contiguous(), scale.float().contiguous(), zero.contiguous()
    (tokens, features), rows, groups = inputs.shape, words.shape[0], scale.shape[1]
    layout = (features, 4 * words.shape[1], groups, group_size, bits)
    if tokens <= FEW_TOKENS:
        width = 1 if tokens == 1 else -(-tokens // 4) * 4  # the kernel takes one token or fours
        padded = torch.zeros(width, groups * group_size)
        padded[:tokens, :features] = inputs
        sums, inputs = padded.reshape(width, groups, group_size).sum(2), padded[:, :features].contiguous()
        y = torch.empty(width, rows)
        _gemv(inputs, sums, words, scale, zero, y, width, rows, *layout)
    else:
        step = max(64, _BUFFER_BYTES // max(4 * features, 1))
        weight = torch.empty(min(step, rows), features)
        transposed = torch.empty(rows, tokens)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            count = part.stop - start
            _dequantize_rows(words[part], scale[part], zero[part], weight, count, *layout)
            torch.mm(weight[:count], inputs.T, out=transposed[part])
        y = transposed.T.contiguous()
    if offsets is not None and columns is not None and values is not None:
        sparse = (offsets.contiguous(), columns.contiguous(), values.float().contiguous())
        if not _add_outliers(inputs, *sparse, y, tokens, rows, features, columns.shape[0]):
            reference.check_outliers(offsets, columns, features)
    return y[:tokens].to(x.dtype)
