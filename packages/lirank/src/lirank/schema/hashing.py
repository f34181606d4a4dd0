"""From a column of ids to 64-bit fingerprints, by `core_tensor.ops.stable_hash`.

Every id is known by its fingerprint from here on: vocabularies, popularity, histories. An integer is hashed as its
eight bytes, so 16777216 and 16777217, or 2**63 + 5, are what they are; a string as its UTF-8 bytes.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from core_tensor.ops.stable_hash import stable_hash

from lirank.schema.columns import decoded

Fingerprints = np.ndarray  # int64, the bits of an XXH64


def fingerprints(name: str, array: pa.Array, type_: str) -> tuple[Fingerprints, np.ndarray]:
    """Fingerprints of a column.

    Args:
        name: The column's name, for messages.
        array: The column, without chunks.
        type_: `"int"` or `"string"`, as in the schema.

    Returns:
        Fingerprints, shape (n,), int64 (0 where null), and which rows are null, shape (n,), bool.

    Raises:
        ValueError: If the column is of another type.
    """
    array = decoded(array)
    null = np.asarray(array.is_null())
    if type_ == "int":
        values = torch.from_numpy(_integers(name, array))
        found = stable_hash(values)[:, 0].numpy()
    else:
        if not pa.types.is_large_string(array.type):
            raise ValueError(f"column {name!r}: expected strings, got {array.type}")
        found = stable_hash(*_string_bytes(array))[:, 0].numpy()
    found[null] = 0
    return found, null


def combined(parts: list[Fingerprints]) -> Fingerprints:
    """One fingerprint for a tuple of ids; a tuple of one keeps its own."""
    if len(parts) == 1:
        return parts[0]
    joined = np.ascontiguousarray(np.stack(parts, 1)).view(np.uint8).reshape(-1)  # (n * k * 8,)
    ends = np.arange(len(parts[0]) + 1, dtype=np.int64) * 8 * len(parts)
    return stable_hash(torch.from_numpy(joined), torch.from_numpy(ends))[:, 0].numpy()


def _integers(name: str, array: pa.Array) -> np.ndarray:
    kind = array.type
    if pa.types.is_boolean(kind):
        array = array.cast(pa.int64())
    elif pa.types.is_uint64(kind):
        values = np.asarray(pc.fill_null(array, pa.scalar(0, pa.uint64())))
        return values.view(np.int64).copy()  # the same 64 bits
    elif pa.types.is_null(kind):
        array = array.cast(pa.int64())
    elif not pa.types.is_integer(kind):
        raise ValueError(f"column {name!r}: expected integers, got {kind}")
    return np.array(pc.fill_null(array.cast(pa.int64()), 0), dtype=np.int64)


def _string_bytes(array: pa.Array) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1].copy()
    buffer = array.buffers()[2]
    raw = np.frombuffer(buffer, np.uint8)[offsets[0] : offsets[-1]].copy() if buffer else np.zeros(0, np.uint8)
    return torch.from_numpy(raw), torch.from_numpy(offsets - offsets[0])
