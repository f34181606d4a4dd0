import core_tensor
import pytest
import torch
from core_tensor.low_rank_add import reference
from core_tensor.testing import assert_close


def _arguments(n, rows, r, d_in, d_out, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n + rows + r + d_in + d_out)
    shapes = ((n * rows, d_out), (n * rows, d_in), (n, r, d_in), (n, r, d_out), (n,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def _explicit(y, x, inner, outer, coefficient, bias):
    """With the matrices of every micro-batch put together."""
    E = coefficient[:, None, None] * (inner.mT @ outer)
    shift = bias * coefficient[:, None, None] * outer.sum(1, keepdim=True)
    return y + (x.unflatten(0, (len(E), -1)) @ E + shift).flatten(0, 1)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 130])
@pytest.mark.parametrize("r", [1, 2, 3, 7, 16, 17, 40])
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (3, 10), (31, 8), (65, 67)])
@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_equal_to_the_matrices_put_together(rows, r, d_in, d_out, bias):
    arguments = _arguments(2, rows, r, d_in, d_out)
    expected, before = _explicit(*arguments, bias), [t.clone() for t in arguments[1:]]
    y = arguments[0].clone()
    reference.low_rank_add_(y, *arguments[1:], bias)
    assert_close("reference", y, expected, 1e-13)
    y = arguments[0].clone()
    assert core_tensor.low_rank_add_(y, *arguments[1:], bias) is y
    assert_close("native", y, expected, 1e-13)
    assert all(map(torch.equal, arguments[1:], before))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_lower_precision(dtype, tolerance):
    arguments = _arguments(8, 16, 16, 130, 70, dtype)
    expected = _explicit(*(t.double() for t in arguments), 1.0)
    assert_close("y", core_tensor.low_rank_add_(*arguments, 1.0).double(), expected, tolerance)


def test_views_with_gaps():
    y, x, inner, outer, coefficient = _arguments(3, 6, 5, 20, 30)
    gappy = y.repeat(1, 2)
    expected = _explicit(gappy[:, :30], x[:, ::2], inner[:, :, ::2], outer, coefficient, 0.0)
    core_tensor.low_rank_add_(gappy[:, :30], x[:, ::2], inner[:, :, ::2], outer, coefficient)
    assert_close("y", gappy[:, :30], expected, 1e-13)
    assert torch.equal(gappy[:, 30:], y)


def test_threads_do_not_change_the_result():
    arguments = _arguments(5, 37, 6, 60, 40)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(core_tensor.low_rank_add_(arguments[0].clone(), *arguments[1:], 1.0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("position", range(5))
def test_bad_input_names_the_argument(position):
    name = ("y", "x", "inner", "outer", "coefficient")[position]
    arguments = _arguments(2, 3, 2, 4, 5)
    wrong = arguments[position][..., None]
    with pytest.raises(ValueError, match=f"^{name}: "):
        core_tensor.low_rank_add_(*arguments[:position], wrong, *arguments[position + 1 :])
    if position:
        with pytest.raises(TypeError, match=f"^{name}: "):
            core_tensor.low_rank_add_(*arguments[:position], arguments[position].float(), *arguments[position + 1 :])


@pytest.mark.parametrize(("n", "rows"), [(0, 4), (3, 4)])
def test_rows_that_micro_batches_do_not_divide(n, rows):
    y, x, inner, outer, coefficient = _arguments(1, rows, 2, 4, 5)
    many = inner.expand(n, -1, -1), outer.expand(n, -1, -1), coefficient.expand(n)
    with pytest.raises(ValueError, match=f"^y: expected rows of {n} micro-batches of one size"):
        core_tensor.low_rank_add_(y, x, *many)


def test_micro_batches_without_rows():
    arguments = _arguments(2, 0, 3, 4, 5)
    assert core_tensor.low_rank_add_(*arguments).shape == (0, 5)
    reference.low_rank_add_(*arguments, 0.0)


def test_opcheck():
    torch.library.opcheck(torch.ops.core_tensor.low_rank_add_.default, (*_arguments(2, 3, 2, 4, 5), 1.0))
