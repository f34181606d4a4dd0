r"""Rows of an embedding table held in 8 bits, straight into the buffer in which a model concatenates its fields.

A row of width D is D codes q in [0, 255], its scale s (float16) and its bias b (float32), D + 6 bytes, and encodes

$$ x_j = s \, q_j + b, \qquad s \ge (\max x - \min x) / 255, \quad b = \min x . $$

The codes are those of "middle-max" quantization, where mid = b + 128 s and the codes are signed: mid = (128 max +
127 min) / 255 and s = (max - min) / 255 give the same grid. The bias is kept in float32, because a float16 offset of
mean 1 is coarser than the codes.

Source: LiRank, arXiv 2402.06859, section 4.2 (row-wise middle-max quantization).
"""

import torch
from torch import Tensor

from core_tensor.checks import check_tensor, has_values
from core_tensor.ops._operator import operator
from core_tensor.ops.quantized_gather import cpu, reference
from core_tensor.ops.quantized_gather.reference import METADATA


def _fake(table: Tensor, ids: Tensor, offsets: Tensor | None) -> Tensor:
    d = table.shape[1] - METADATA
    shape = (ids.shape[0], ids.shape[1] * d) if offsets is None else (offsets.shape[0] - 1, d)
    return table.new_empty(shape, dtype=torch.float32)


_quantized_gather = operator(
    "quantized_gather(Tensor table, Tensor ids, Tensor? offsets) -> Tensor",
    reference=reference.quantized_gather,
    fake=_fake,
    cpu=cpu.quantized_gather,
)


def quantize_rows(weight: Tensor) -> Tensor:
    """Quantize a table row by row to 8 bits.

    Args:
        weight: The table, shape (N, D), float32 or float16, finite, every row spanning less than 1e7.

    Returns:
        Codes, scales and biases, shape (N, D + 6), uint8: what `quantized_gather` reads.

    Raises:
        ValueError: If the shape is wrong, a value is not finite, or a row spans more than a float16 scale can.
        TypeError: If the dtype is wrong.
    """
    check_tensor("weight", weight, ndim=2, dtype=(torch.float32, torch.float16), finite=True)
    if weight.numel() == 0:
        raise ValueError(f"weight: expected at least one value, got shape {tuple(weight.shape)}")
    low, high = weight.float().aminmax(dim=1)
    if has_values(weight) and bool(((high - low) / 255 > 6e4).any()):
        raise ValueError("weight: expected rows that span less than 255 * 60000, the reach of a float16 scale")
    return reference.quantize_rows(weight)


def dequantize_rows(table: Tensor) -> Tensor:
    """The values that quantized rows encode.

    Args:
        table: What `quantize_rows` returned, shape (N, D + 6), uint8.

    Returns:
        Values, shape (N, D), float32.
    """
    _check_table(table)
    return reference.dequantize_rows(table)


def _check_table(table: Tensor) -> None:
    check_tensor("table", table, ndim=2, dtype=torch.uint8)
    if table.shape[1] <= METADATA:
        raise ValueError(f"table: expected more than {METADATA} bytes per row, got {table.shape[1]}")


def quantized_gather(table: Tensor, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Look up rows of a quantized table, one id per field, or bags of ids that are summed.

    Args:
        table: What `quantize_rows` returned, shape (N, D + 6), uint8.
        ids: Rows, int64: shape (B, F), one per field, or with `offsets` shape (n,).
        offsets: Where each bag begins and the last one ends, shape (bags + 1,), int64, from 0 to n, non-decreasing;
            a bag may be empty.

    Returns:
        Values, float32: shape (B, F D), fields side by side; with `offsets` the sum of every bag, shape (bags, D). No
        gradient passes.

    Raises:
        ValueError: If shapes do not fit, an id is outside [0, N), or the offsets do not cover the ids.
        TypeError: If a dtype is wrong.
    """
    _check_table(table)
    check_tensor("ids", ids, ndim=2 if offsets is None else 1, dtype=torch.int64, device=table.device)
    if offsets is not None:
        check_tensor("offsets", offsets, ndim=1, dtype=torch.int64, device=table.device, nonempty=True)
    values: Tensor = _quantized_gather(table, ids, offsets)
    return values
