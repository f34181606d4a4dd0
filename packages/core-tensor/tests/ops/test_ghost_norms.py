import core_tensor
import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.ghost_norms import reference
from hypothesis import given, settings
from hypothesis import strategies as st


def _factors(n, r, widths, dtype=torch.float64, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, r, d, generator=generator, dtype=torch.float64) * size).to(dtype) for d in widths]


def _explicit(left, right, bias):
    """Norms of the gradients themselves, each put together."""
    total = torch.zeros(left[0].shape[0], dtype=torch.float64)
    for a, b, beta in zip(left, right, bias, strict=True):
        a, b = a.double(), b.double()
        total += (a.mT @ b).square().sum((1, 2)) + beta * a.sum(1).square().sum(1)
    return total


@pytest.mark.parametrize("r", [1, 2, 3, 4, 5, 7, 16, 33])
@pytest.mark.parametrize(("d_0", "d_1"), [(1, 1), (3, 8), (10, 31), (64, 65)])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_equal_to_the_norm_of_the_gradient(r, d_0, d_1, beta):
    left, right = _factors(3, r, (d_0,)), _factors(3, r, (d_1,), seed=1)
    expected = _explicit(left, right, [beta])
    assert_close("native", core_tensor.ghost_norms(left, right, [beta]), expected, 1e-13)
    assert_close("reference", reference.ghost_norms(left, right, [beta]), expected, 1e-13)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 20)] * 3), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 10**6))
def test_layers_add_up(layers, n, seed):
    left = [_factors(n, r, (d,), seed=seed + i)[0] for i, (r, d, _) in enumerate(layers)]
    right = [_factors(n, r, (d,), seed=seed - i - 1)[0] for i, (r, _, d) in enumerate(layers)]
    bias = [float(i % 2) for i in range(len(layers))]
    assert_close("squares", core_tensor.ghost_norms(left, right, bias), _explicit(left, right, bias), 1e-12)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e8])
def test_float32(size):
    left, right = _factors(8, 16, (70,), torch.float32, size), _factors(8, 16, (50,), torch.float32, seed=1)
    left, right = [*left, left[0][:, :, :9]], [*right, right[0][:, :, :33]]  # views with gaps
    found = core_tensor.ghost_norms(left, right, [1.0, 0.0])
    assert found.dtype == torch.float64
    assert_close("squares", found, _explicit(left, right, [1.0, 0.0]), 1e-6)


def test_threads_do_not_change_the_result():
    left, right = _factors(5, 37, (60, 40)), _factors(5, 37, (30, 7), seed=1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(core_tensor.ghost_norms(left, right, [1.0, 0.0]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_gradient_that_is_not_finite_shows():
    left, right = _factors(2, 3, (4,)), _factors(2, 3, (4,))
    left[0][1, 0, 0] = torch.nan
    found = core_tensor.ghost_norms(left, right, [1.0])
    assert found.isfinite().tolist() == [True, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda left, right: ([], []), ValueError, "left: expected as many layers"),
        (lambda left, right: (left, right * 2), ValueError, "left: expected as many layers"),
        (lambda left, right: (left, [right[0][:1]]), ValueError, "right"),
        (lambda left, right: (left, [right[0].float()]), TypeError, "right"),
        (lambda left, right: ([left[0].half()], right), TypeError, "left"),
        (lambda left, right: ([left[0][:, :0]], right), ValueError, "left"),
        (lambda left, right: ([left[0][0]], right), ValueError, "left"),
    ],
)
def test_bad_input(change, error, message):
    left, right = change(_factors(2, 3, (4,)), _factors(2, 3, (5,)))
    with pytest.raises(error, match=message):
        core_tensor.ghost_norms(left, right, [1.0] * max(len(left), len(right), 1))


def test_opcheck():
    arguments = (_factors(2, 3, (4, 5)), _factors(2, 3, (6, 7)), [1.0, 0.0])
    torch.library.opcheck(torch.ops.core_tensor.ghost_norms.default, arguments)
