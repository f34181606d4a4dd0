"""Golden vectors were made with the reference implementation of xxHash (python-xxhash 4.1, xxhash 0.8.3)."""

import os
import subprocess
import sys

import pytest
import torch
from core_tensor.ops.stable_hash import reference, stable_hash
from hypothesis import given, settings
from hypothesis import strategies as st

STRINGS = {
    b"": (0xEF46DB3751D8E999, 0x95F0626F6F0A4409),
    b"a": (0xD24EC4F1A98C6E5B, 0xDC6349D489E0F965),
    b"abc": (0x44BC2CF5AD770999, 0x9E755206156676D7),
    b"user-42": (0x397E9D3A76AF7C81, 0xD33648CCD6445F39),
    b"0123456789012345678901234567890123456789": (0xCA6FC80CBDE1A931, 0x51DCB9B2F700478B),
    "Grüße".encode(): (0x29964875BFE3CB55, 0x43AD40CE641BA1BF),
}
INTEGERS = {
    0: 0x34C96ACDCADB1BBB,
    1: 0x9F29CB17A2A49995,
    -1: 0x85D136ADB773C6C9,
    1 << 40: 0xA13EA4C7924FD453,
    16777216: 0x47A91D3E9D51E21E,
    16777217: 0x7B0F88B31F567233,
    1 << 31: 0x684A11B3AD0F3BB4,
    (1 << 63) + 5 - (1 << 64): 0x9EF73A35C6D63AF5,  # uint64 2**63 + 5
}
SPLITMIX = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
"""First outputs of splitmix64 seeded with 0, as published with xoshiro."""


def packed(strings):
    raw = b"".join(strings)
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)
    return values, torch.tensor([0, *torch.tensor([len(s) for s in strings]).cumsum(0).tolist()])


def bits(hashes):
    return [int(h) & ((1 << 64) - 1) for h in hashes]


def test_golden_vectors():
    for seed, column in ((0, 0), (7, 1)):
        found = bits(stable_hash(*packed(list(STRINGS)), seed=seed)[:, 0])
        assert found == [golden[column] for golden in STRINGS.values()]
    assert bits(stable_hash(torch.tensor(list(INTEGERS)))[:, 0]) == list(INTEGERS.values())


def test_further_hashes_are_splitmix64():
    gamma = 0x9E3779B97F4A7C15
    assert [reference.splitmix64((j + 1) * gamma) for j in range(3)] == SPLITMIX
    first, *further = bits(stable_hash(torch.tensor([5]), moduli=(0, 0, 0))[0])
    assert further == [reference.splitmix64(first + j * gamma) for j in (1, 2)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(max_size=70), max_size=9), st.integers(0, 1 << 62), st.lists(st.integers(0, 1 << 62), min_size=1)
)
def test_equal_to_the_reference(strings, seed, moduli):
    found = stable_hash(*packed(strings), seed=seed, moduli=moduli)
    assert torch.equal(found, reference.stable_hash(*packed(strings), seed, moduli))
    for j, modulus in enumerate(moduli):
        assert modulus == 0 or bool(((found[:, j] >= 0) & (found[:, j] < modulus)).all())


def test_the_same_in_every_process():
    code = (
        "import torch; from core_tensor.ops.stable_hash import stable_hash\n"
        "raw = torch.tensor(list('ä user'.encode()), dtype=torch.uint8)\n"
        "print(int(stable_hash(raw, torch.tensor([0, len(raw)]))))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": s}, capture_output=True, check=True
        ).stdout
        for s in ("0", "1")
    }
    assert len(found) == 1


def test_pairs_of_derived_hashes_collide_like_independent_ones():
    n, m = 200_000, 1 << 10
    rows = stable_hash(torch.arange(n), moduli=(m, m))
    distinct = len(torch.unique(rows[:, 0] * m + rows[:, 1]))
    cells = m * m
    assert distinct == pytest.approx(cells * (1 - (1 - 1 / cells) ** n), rel=0.002)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: stable_hash(torch.zeros(2)), TypeError, "values: .*int64"),
        (lambda: stable_hash(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2])), TypeError, "values: .*uint8"),
        (lambda: stable_hash(torch.zeros(2, dtype=torch.uint8), torch.tensor([0, 3])), ValueError, "offsets: "),
        (lambda: stable_hash(torch.zeros(2, dtype=torch.uint8), torch.tensor([-1, 2])), ValueError, "offsets: "),
        (lambda: stable_hash(torch.zeros(2, dtype=torch.uint8), torch.tensor([0, 2, 1])), ValueError, "offsets: "),
        (lambda: stable_hash(torch.zeros(2, dtype=torch.int64), moduli=(-1,)), ValueError, "moduli: "),
        (lambda: stable_hash(torch.zeros(2, dtype=torch.int64), seed=-1), ValueError, "seed: "),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_opcheck():
    torch.library.opcheck(torch.ops.core_tensor.stable_hash.default, (torch.arange(5), None, 3, [0, 7]))
    torch.library.opcheck(torch.ops.core_tensor.stable_hash.default, (*packed([b"a", b"", b"bc"]), 3, [11]))
