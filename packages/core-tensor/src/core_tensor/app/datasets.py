"""Readers of the small public data sets on which several packages demonstrate themselves."""

import gzip
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from core_tensor.app.extras import require
from core_tensor.app.files import reading

if TYPE_CHECKING:
    import numpy as np

_BYTES = b"\0\0\x08"
"""How an IDX file of unsigned bytes begins; the number of dimensions follows."""


def read_idx(path: str | os.PathLike[str]) -> "np.ndarray":
    """Read an IDX file of bytes, the format of MNIST and its successors, gzipped or not.

    Args:
        path: The file, or its name without `.gz`, as in `train-images-idx3-ubyte`.

    Returns:
        uint8 array of the shape that the file states.

    Raises:
        ValueError: If the file is broken or of another kind.
        FileNotFoundError: If it is absent, with and without `.gz`.
    """
    import numpy as np

    plain = Path(path)
    packed = plain.with_name(plain.name + ".gz")
    found = next((file for file in (plain, packed) if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{plain}: no such file, nor {packed.name}")
    with reading(found, "an IDX file of bytes"):
        raw = found.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        if raw[:3] != _BYTES:
            raise ValueError("it begins otherwise")
        shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
        body = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape))
        if body.size != (promised := int(np.prod(shape, dtype=object))):
            raise ValueError(f"it states {promised} bytes of data and has {body.size}")
        return body.reshape(shape).copy()


def digits(extra: str) -> "tuple[np.ndarray, np.ndarray]":
    """The 1,797 handwritten digits that scikit-learn ships.

    Args:
        extra: Requirement that brings scikit-learn, such as `"msam[demo]"`.

    Returns:
        Images, shape (1797, 8, 8), float64 in [0, 16], and labels, shape (1797,), int64.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    bunch = require("sklearn.datasets", extra).load_digits()
    return bunch.images, bunch.target
