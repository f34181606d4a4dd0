"""Plain torch: take the rows, spread the codes over their ranges, and sum where there are bags."""

import torch
from torch import Tensor

from core_tensor.checks import check_indices, check_offsets
from core_tensor.memory import huge_pages

METADATA = 6
"""Bytes behind the codes of a row: the scale in float16, the bias in float32."""


def quantize_rows(weight: Tensor) -> Tensor:
    """See `core_tensor.quantize_rows`."""
    low, high = weight.float().aminmax(dim=1)
    scale = ((high - low) / 255).half()
    # rounded up, so that the largest value stays within code 255; a row of equal values has scale 0
    scale = torch.where(scale.float() * 255 < high - low, torch.nextafter(scale, scale.new_tensor(torch.inf)), scale)
    step = torch.where(scale > 0, scale.float(), 1.0)
    codes = ((weight.float() - low[:, None]) / step[:, None]).round_().clamp_(0, 255).to(torch.uint8)
    parts = [codes, scale[:, None].view(torch.uint8), low[:, None].view(torch.uint8)]
    table = huge_pages(codes.new_empty(len(codes), codes.shape[1] + METADATA))
    return torch.cat(parts, 1, out=table)


def dequantize_rows(table: Tensor) -> Tensor:
    """The values that a table of codes encodes, shape (N, D), float32."""
    d = table.shape[1] - METADATA
    scale = table[:, d : d + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()  # (N, 1)
    bias = table[:, d + 2 :].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return table[:, :d].float() * scale + bias


def check(table: Tensor, ids: Tensor, offsets: Tensor | None) -> None:
    """Refuse ids that name no row, and offsets that do not cover the ids."""
    if offsets is not None:
        check_offsets("offsets", offsets, len(ids))
    check_indices("ids", ids, len(table))


def quantized_gather(table: Tensor, ids: Tensor, offsets: Tensor | None) -> Tensor:
    """See `core_tensor.quantized_gather`."""
    check(table, ids, offsets)
    rows = dequantize_rows(table[ids.flatten()])  # (n, D)
    if offsets is None:
        return rows.reshape(ids.shape[0], ids.shape[1] * rows.shape[1])
    bag = torch.arange(len(offsets) - 1, device=ids.device).repeat_interleave(offsets.diff())
    return rows.new_zeros(len(offsets) - 1, rows.shape[1]).index_add_(0, bag, rows)
