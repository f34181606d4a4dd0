import core_tensor
import pytest
import torch
from core_tensor.ops.bit_packing import reference
from hypothesis import given, settings
from hypothesis import strategies as st


def _codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 131), st.integers(0, 9))
def test_round_trip_and_equal_to_reference(bits, rows, columns, seed):
    codes = _codes(rows, columns, bits, seed)
    words = core_tensor.pack_bits(codes, bits)
    assert words.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(words, reference.pack_bits(codes, bits))
    assert torch.equal(core_tensor.unpack_bits(words, bits, columns), codes)
    assert torch.equal(reference.unpack_bits(words, bits, columns), codes)


def test_stream_is_the_documented_number():
    codes = _codes(1, 43, 3)
    stream = sum(int(c) << (3 * j) for j, c in enumerate(codes[0]))
    words = core_tensor.pack_bits(codes, 3)[0]
    assert [int(w) & 0xFFFFFFFF for w in words] == [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(5)]


def test_non_contiguous_input():
    codes = _codes(6, 40, 5).T
    assert torch.equal(core_tensor.unpack_bits(core_tensor.pack_bits(codes, 5), 5, 6), codes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: core_tensor.pack_bits(torch.full((1, 2), 8, dtype=torch.uint8), 3),
            ValueError,
            "codes: .*below",
        ),
        (lambda: core_tensor.pack_bits(torch.zeros(1, 2), 3), TypeError, "codes: .*uint8"),
        (lambda: core_tensor.pack_bits(torch.zeros(2, dtype=torch.uint8), 3), ValueError, "codes: .*2 dim"),
        (lambda: core_tensor.pack_bits(torch.zeros(1, 2, dtype=torch.uint8), 9), ValueError, "bits: "),
        (lambda: core_tensor.unpack_bits(torch.zeros(1, 2, dtype=torch.int32), 3, 40), ValueError, "words: "),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_opcheck():
    codes = _codes(3, 17, 3)
    torch.library.opcheck(torch.ops.core_tensor.pack_bits.default, (codes, 3))
    torch.library.opcheck(torch.ops.core_tensor.unpack_bits.default, (core_tensor.pack_bits(codes, 3), 3, 17))
