"""How a member's record becomes bytes: the key, the vector (float32 or int8), its age and size, its precision."""

import struct
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from meta_embed.tasks.encode import LONGEST_KEY

Array = np.ndarray[Any, Any]
Key = int | str
_HEAD = struct.Struct("<dI")  # time of the newest event, events of the support
WIDEST = 1 << 16
"""Numbers of a vector."""


class StoreInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a store says about itself.

    Attributes:
        version: Of the model whose vectors these are; scores need the global block of the same version.
        width: Length of a vector.
        key: Kind of the entity keys.
        codec: How vectors are stored.
        precision: What is stored of the posterior precision: nothing, its diagonal, or all of it.
        cold: Vector of members whom the store does not know.
        as_of: Time of the newest event at generation, seconds.
        support: Latest events of a member that its vector is made of.
        history: Bytes of one event kept for refreshing; 0 if none are kept.
    """

    version: str
    width: int
    key: Literal["int", "str"]
    codec: Literal["int8", "float32"] = "int8"
    precision: Literal["none", "diagonal", "full"] = "none"
    cold: tuple[float, ...] = ()
    as_of: float = 0.0
    support: int = 32
    history: int = 0

    def __post_init__(self) -> None:
        """Refuse a layout that no store has."""
        if not 1 <= self.width <= WIDEST or self.support < 0 or self.history < 0:
            raise ValueError(f"expected a width of 1 to {WIDEST} and support, history >= 0")
        if len(self.cold) not in {0, self.width}:
            raise ValueError(f"cold: expected {self.width} numbers, got {len(self.cold)}")

    @property
    def precision_floats(self) -> int:
        """Numbers stored of a precision."""
        return {"none": 0, "diagonal": self.width, "full": self.width * (self.width + 1) // 2}[self.precision]

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector."""
        return 4 * self.width if self.codec == "float32" else 4 + self.width

    @property
    def value_bytes(self) -> int:
        """Bytes of a record without its key and history."""
        return _HEAD.size + self.vector_bytes + 4 * self.precision_floats


@dataclass(frozen=True)
class Records:
    """Vectors of some members.

    Attributes:
        vectors: Shape (B, d), float32.
        times: Time of each member's newest event, seconds, shape (B,).
        counts: Events of each support, shape (B,).
        precisions: Diagonals, or upper triangles row by row, of the posterior precisions, float32; no column if absent.
    """

    vectors: Array
    times: Array
    counts: Array
    precisions: Array


def encode_key(key: Any, kind: str) -> bytes:
    """Bytes of a key that sort as the keys do.

    Args:
        key: An integer or a string.
        kind: The store's kind, `int` or `str`.

    Returns:
        The bytes.

    Raises:
        TypeError: If the key is of the other kind: 7 and "7" are different members, and only one of them is here.
        ValueError: If the key is out of range or too long.
    """
    if kind == "int":
        if isinstance(key, bool) or not isinstance(key, int | np.integer):
            raise TypeError(f"entity: this store has integer keys, got {key!r} ({type(key).__name__})")
        if not -(2**63) <= int(key) < 2**63:
            raise ValueError(f"entity: expected a key of 64 bits, got {key}")
        return struct.pack(">Q", (int(key) + 2**63) & (2**64 - 1))
    if not isinstance(key, str):
        raise TypeError(f"entity: this store has string keys, got {key!r} ({type(key).__name__})")
    raw = key.encode()
    if not 0 < len(raw) <= LONGEST_KEY:
        raise ValueError(f"entity: expected a key of 1 to {LONGEST_KEY} bytes, got {len(raw)}")
    return raw


def decode_key(raw: bytes, kind: str) -> Key:
    """The key that `encode_key` wrote."""
    if kind == "str":
        return raw.decode()
    if len(raw) != 8:
        raise ValueError(f"a key of {len(raw)} bytes, expected 8")
    return int(struct.unpack(">Q", raw)[0]) - 2**63


def quantize(vectors: Array) -> tuple[Array, Array, Array]:
    """Rows to 8 bits about the middle of their range.

    Args:
        vectors: Shape (B, d), float32, finite.

    Returns:
        Codes, shape (B, d), int8; scales and middles, shape (B,), float16.

    Raises:
        ValueError: If a value is beyond the range of float16.
    """
    if vectors.size and not float(np.abs(vectors).max()) < 3e4:
        most = np.abs(vectors).max()
        raise ValueError(f"vectors: expected values below 3e4 for int8 storage, got {most:g}; float32 holds them")
    low, high = vectors.min(1), vectors.max(1)
    middle = ((low + high) / 2).astype(np.float16)
    reach = np.maximum(high - middle.astype(np.float32), middle.astype(np.float32) - low)
    scale = np.nextafter((reach / 127).astype(np.float16), np.float16(np.inf))  # rounded up: the ends stay in range
    codes = np.rint((vectors - middle[:, None].astype(np.float32)) / scale[:, None].astype(np.float32))
    return np.clip(codes, -127, 127).astype(np.int8), scale, middle


def _layout(info: StoreInfo) -> np.dtype[Any]:
    vector = [("vector", "<f4", (info.width,))]
    if info.codec == "int8":
        vector = [("scale", "<f2"), ("middle", "<f2"), ("codes", "i1", (info.width,))]  # type: ignore[list-item]
    return np.dtype([("time", "<f8"), ("count", "<u4"), *vector, ("precision", "<f4", (info.precision_floats,))])


def encode_records(records: Records, info: StoreInfo) -> list[bytes]:
    """Bytes of every record.

    Args:
        records: The records.
        info: The store's layout.

    Returns:
        One value per record.
    """
    out = np.zeros(len(records.vectors), _layout(info))
    out["time"], out["count"], out["precision"] = records.times, records.counts, records.precisions
    if info.codec == "int8":
        out["codes"], out["scale"], out["middle"] = quantize(records.vectors)
    else:
        out["vector"] = records.vectors
    raw, size = out.tobytes(), out.dtype.itemsize
    return [raw[i : i + size] for i in range(0, len(raw), size)]


def decode_records(values: list[bytes], info: StoreInfo) -> Records:
    """The records that `encode_records` wrote.

    Args:
        values: One value per record.
        info: The store's layout.

    Returns:
        The records.

    Raises:
        ValueError: If a value has another size: the store is corrupt, or of another layout.
    """
    layout = _layout(info)
    raw = b"".join(values)
    if len(raw) != layout.itemsize * len(values) or any(len(v) != layout.itemsize for v in values):
        raise ValueError(f"corrupt record: expected {layout.itemsize} bytes for vectors of width {info.width}")
    found = np.frombuffer(raw, layout)
    if info.codec == "int8":
        scale, middle = found["scale"].astype(np.float32), found["middle"].astype(np.float32)
        vectors = found["codes"].astype(np.float32) * scale[:, None] + middle[:, None]
    else:
        vectors = found["vector"].astype(np.float32)
    return Records(vectors, found["time"].copy(), found["count"].astype(np.int64), found["precision"].copy())
