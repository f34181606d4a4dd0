import gzip
import struct

import numpy as np
import pytest
from core_tensor.app.datasets import digits, read_idx


def _idx(*shape):
    return b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def test_idx_plain_and_gzipped(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    raw = _idx(2, 3, 4) + pixels.tobytes()
    (tmp_path / "a-ubyte").write_bytes(raw)
    (tmp_path / "b-ubyte.gz").write_bytes(gzip.compress(raw))
    for name in ("a-ubyte", "b-ubyte", "b-ubyte.gz"):
        assert np.array_equal(read_idx(tmp_path / name), pixels)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0",
        b"\0\0\x0d\x01" + b"\0" * 8,
        _idx(3),
        _idx(2**31, 2**31, 2**31) + b"x",
        _idx(2) + b"xyz",
        b"\0\0\x08\xff",
        gzip.compress(_idx(2) + b"xy", mtime=0)[:-9],
        b"\x1f\x8b broken",
    ],
)
def test_a_broken_idx_file_is_named(tmp_path, raw):
    (tmp_path / "broken-ubyte").write_bytes(raw)
    with pytest.raises(ValueError, match="broken-ubyte: expected an IDX file of bytes"):
        read_idx(tmp_path / "broken-ubyte")


def test_an_absent_idx_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x-ubyte: no such file, nor x-ubyte\.gz"):
        read_idx(tmp_path / "x-ubyte")


def test_digits():
    pytest.importorskip("sklearn")
    images, labels = digits("core-tensor[test]")
    assert images.shape == (1797, 8, 8)
    assert labels.shape == (1797,)
    assert images.max() == 16
