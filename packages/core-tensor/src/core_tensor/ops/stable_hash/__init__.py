r"""Hashes that never change: the same on every machine, in every process, in every release.

The hash of a byte string x is $h_0 = \mathrm{XXH64}(x; seed)$ as published by xxHash; an int64 is the string of its
eight little-endian bytes. Further hashes of the same value cost no second pass over its bytes: they are the outputs of
the generator splitmix64 seeded with the first,

$$ h_j = \mathrm{splitmix64}(h_0 + j \, \gamma), \quad \gamma = \mathtt{0x9E3779B97F4A7C15}, \qquad
r_j = h_j \bmod m_j . $$

Sources: the specification of xxHash, version 0.1.1; Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core_tensor.checks import check_number, check_tensor, has_values
from core_tensor.ops._operator import operator
from core_tensor.ops.stable_hash import cpu, reference


def _fake(values: Tensor, offsets: Tensor | None, seed: int, moduli: list[int]) -> Tensor:
    n = values.shape[0] if offsets is None else offsets.shape[0] - 1
    return values.new_empty((n, len(moduli)), dtype=torch.int64)


_stable_hash = operator(
    "stable_hash(Tensor values, Tensor? offsets, int seed, int[] moduli) -> Tensor",
    reference=reference.stable_hash,
    fake=_fake,
    cpu=cpu.stable_hash,
)


def stable_hash(
    values: Tensor, offsets: Tensor | None = None, *, seed: int = 0, moduli: Sequence[int] = (0,)
) -> Tensor:
    """Hash int64 values, or the byte strings of a column of strings, k times in one pass.

    Args:
        values: With `offsets` the bytes of all strings in a row, shape (bytes,), uint8; without, shape (n,), int64.
        offsets: Where each string begins and the last one ends, shape (n + 1,), int64, non-decreasing.
        seed: Seed of XXH64, from 0 to 2**62.
        moduli: One entry per hash: the number of rows it falls on, or 0 for all 64 bits.

    Returns:
        Hashes, shape (n, k), int64: below its modulus, or the 64 bits as a signed number.

    Raises:
        ValueError: If shapes do not fit, an offset is out of range, or a modulus is negative or absent.
        TypeError: If a dtype is wrong.
    """
    check_number("seed", seed, low=0, high=1 << 62, integer=True)
    if not isinstance(moduli, (list, tuple)) or not moduli:
        raise ValueError("moduli: expected a list of at least one")
    for modulus in moduli:
        check_number("moduli", modulus, low=0, high=1 << 62, integer=True)
    if offsets is None:
        check_tensor("values", values, ndim=1, dtype=torch.int64)
    else:
        check_tensor("values", values, ndim=1, dtype=torch.uint8)
        check_tensor("offsets", offsets, ndim=1, dtype=torch.int64, device=values.device, nonempty=True)
        outside = has_values(offsets) and (int(offsets[0]) < 0 or int(offsets[-1]) > len(values))
        if outside or (has_values(offsets) and bool((offsets[1:] < offsets[:-1]).any())):
            raise ValueError(f"offsets: expected non-decreasing values in [0, {len(values)}], the number of bytes")
    hashes: Tensor = _stable_hash(values, offsets, seed, list(moduli))
    return hashes
