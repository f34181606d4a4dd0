"""Plain torch bit packing: spread every code into its bits, then gather the bits into words."""

import torch
from torch import Tensor


def check_codes(codes: Tensor, bits: int) -> None:
    """Refuse codes of more bits."""
    largest = int(codes.max()) if codes.numel() else 0
    if largest >= 1 << bits:
        raise ValueError(f"codes: expected values below 2**{bits} = {1 << bits}, got {largest}")


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """See `core_tensor.pack_bits`."""
    check_codes(codes, bits)
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    stream = (codes.long()[:, :, None] >> torch.arange(bits, device=codes.device)) & 1  # (rows, columns, bits)
    stream = torch.nn.functional.pad(stream.reshape(rows, columns * bits), (0, words * 32 - columns * bits))
    weights = torch.ones(32, dtype=torch.long, device=codes.device) << torch.arange(32, device=codes.device)
    value = (stream.reshape(rows, words, 32) * weights).sum(-1)  # unsigned value of each word, in int64
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)


def unpack_bits(words: Tensor, bits: int, columns: int) -> Tensor:
    """See `core_tensor.unpack_bits`."""
    rows = words.shape[0]
    stream = (words.long()[:, :, None] >> torch.arange(32, device=words.device)) & 1  # (rows, words, 32)
    stream = stream.reshape(rows, words.shape[1] * 32)[:, : columns * bits].reshape(rows, columns, bits)
    return (stream << torch.arange(bits, device=words.device)).sum(-1).to(torch.uint8)
