"""Plain torch: unpack everything, add the outliers, multiply."""

import torch
from torch import Tensor

from core_tensor.checks import check_indices, check_offsets
from core_tensor.ops.bit_packing.reference import unpack_bits


def check_outliers(offsets: Tensor, columns: Tensor, features: int) -> None:
    """Refuse outliers that name a column beyond the features, or are not in compressed sparse rows."""
    check_offsets("outliers[0]", offsets, columns.shape[0])
    check_indices("outliers[1]", columns, features)


def dequantize(
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    features: int,
    offsets: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
) -> Tensor:
    """The weights that codes, scales and outliers encode, shape (q, p), float32."""
    codes = unpack_bits(words, bits, features)
    group = torch.arange(features, device=words.device) // max(group_size, 1)
    weight = scale.float()[:, group] * (codes.float() - zero.float()[:, group])
    if offsets is not None and columns is not None and values is not None:
        rows = torch.arange(len(offsets) - 1, device=words.device).repeat_interleave(offsets.diff())
        weight.index_put_((rows, columns.long()), values.float(), accumulate=True)
    return weight


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
    if offsets is not None and columns is not None:
        check_outliers(offsets, columns, x.shape[1])
    weight = dequantize(words, scale, zero, bits, group_size, x.shape[1], offsets, columns, values)
    return (x.float() @ weight.T).to(x.dtype)
