from fractions import Fraction

import core_tensor
import pytest
import torch
from core_tensor.dev.testing import AWKWARD_SIZES, assert_close
from core_tensor.ops.centred_moments import reference
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _rows(n, d, dtype=torch.float64, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 999))
def test_equal_to_fractions(n, d, seed):
    x = _rows(n, d, seed=seed)
    exact = [[Fraction(v) for v in row] for row in x.tolist()]
    mean = [sum(column) / n for column in zip(*exact, strict=True)]
    scatter = [[sum((r[i] - mean[i]) * (r[j] - mean[j]) for r in exact) for j in range(d)] for i in range(d)]
    for got in (core_tensor.centred_moments(x), reference.centred_moments(x)):
        assert_close("mean", torch.tensor([float(m) for m in mean], dtype=torch.float64), got[0], 1e-14)
        truth = torch.tensor([[float(s) for s in row] for row in scatter], dtype=torch.float64)
        assert torch.allclose(truth, got[1], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", AWKWARD_SIZES)
@pytest.mark.parametrize("n", [1, 255, 257, 600])
def test_equal_to_reference(n, d, dtype):
    x = _rows(n, d, dtype, seed=d)
    mean, scatter = core_tensor.centred_moments(x)
    truth = reference.centred_moments(x)
    assert mean.dtype == scatter.dtype == torch.float64
    assert (mean - truth[0]).abs().max() <= 1e-14 * x.double().abs().mean()  # a mean near zero has no digits of its own
    if n > 1:
        assert_close("scatter", truth[1], scatter, 1e-14)
    else:
        assert scatter.abs().max() == 0
    assert torch.equal(scatter, scatter.T)


def test_large_means_drifts_and_outliers_keep_their_digits():
    x = _rows(1000, 5)
    shifted = x + 2.0**27  # representable up to 2^-26
    truth = core_tensor.centred_moments(shifted - 2.0**27)[1]
    assert_close("shift", truth, core_tensor.centred_moments(shifted)[1], 1e-14)
    x[256:] += 1e6  # the first block's mean says nothing about the rest
    assert_close("drift", reference.centred_moments(x)[1], core_tensor.centred_moments(x)[1], 1e-14)
    x[3] = 1e9
    assert_close("outlier", reference.centred_moments(x)[1], core_tensor.centred_moments(x)[1], 1e-13)


def test_bits_do_not_depend_on_threads_or_strides():
    x = _rows(700, 90, torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(core_tensor.centred_moments(x))
    finally:
        torch.set_num_threads(threads)
    found.append(core_tensor.centred_moments(x.T.contiguous().T))
    for mean, scatter in found[1:]:
        assert torch.equal(mean, found[0][0])
        assert torch.equal(scatter, found[0][1])


def test_schema_and_fake():
    torch.library.opcheck(torch.ops.core_tensor.centred_moments.default, (_rows(7, 3),))


def test_no_gradient_passes():
    assert not core_tensor.centred_moments(_rows(4, 2).requires_grad_())[1].requires_grad


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3), ValueError, "x: expected 2 dim"),
        (torch.zeros(0, 3), ValueError, "x: expected at least one element"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "x: expected dtype"),
    ],
)
def test_bad_input(x, error, message):
    with pytest.raises(error, match=message):
        core_tensor.centred_moments(x)
