"""Pure Python integers: XXH64 as published, then splitmix64, one value at a time."""

import itertools

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_P1, _P2, _P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P4, _P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_GAMMA = 0x9E3779B97F4A7C15


def stable_hash(values: Tensor, offsets: Tensor | None, seed: int, moduli: list[int]) -> Tensor:
    """See `core_tensor.stable_hash`."""
    raw = values.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    ends = range(0, len(raw) + 1, 8) if offsets is None else offsets.tolist()
    rows = []
    for start, end in itertools.pairwise(ends):
        first = xxh64(raw[start:end], seed & _MASK)
        hashes = [first] + [splitmix64(first + j * _GAMMA) for j in range(1, len(moduli))]
        rows.append([signed(h) if m == 0 else h % m for h, m in zip(hashes, moduli, strict=True)])
    return torch.tensor(rows, dtype=torch.int64, device=values.device).reshape(len(rows), len(moduli))


def xxh64(data: bytes, seed: int = 0) -> int:
    """XXH64 of a byte string, as in the specification of xxHash (doc/xxhash_spec.md, version 0.1.1)."""
    position, length = 0, len(data)
    if length >= 32:
        lanes = [(seed + _P1 + _P2) & _MASK, (seed + _P2) & _MASK, seed, (seed - _P1) & _MASK]
        while position + 32 <= length:
            for i in range(4):
                lanes[i] = _round(lanes[i], _word(data, position + 8 * i, 8))
            position += 32
        value = sum(_rotate(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True)) & _MASK
        for lane in lanes:
            value = ((value ^ _round(0, lane)) * _P1 + _P4) & _MASK
    else:
        value = (seed + _P5) & _MASK
    value = (value + length) & _MASK
    while position + 8 <= length:
        value = (_rotate(value ^ _round(0, _word(data, position, 8)), 27) * _P1 + _P4) & _MASK
        position += 8
    if position + 4 <= length:
        value = (_rotate(value ^ (_word(data, position, 4) * _P1 & _MASK), 23) * _P2 + _P3) & _MASK
        position += 4
    for byte in data[position:]:
        value = _rotate(value ^ (byte * _P5 & _MASK), 11) * _P1 & _MASK
    value = (value ^ (value >> 33)) * _P2 & _MASK
    value = (value ^ (value >> 29)) * _P3 & _MASK
    return value ^ (value >> 32)


def splitmix64(x: int) -> int:
    """The output function of splitmix64 (Steele, Lea and Flood 2014)."""
    x &= _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _rotate(x: int, by: int) -> int:
    return ((x << by) | (x >> (64 - by))) & _MASK


def _round(accumulator: int, word: int) -> int:
    return _rotate((accumulator + word * _P2) & _MASK, 31) * _P1 & _MASK


def _word(data: bytes, position: int, size: int) -> int:
    return int.from_bytes(data[position : position + size], "little")
