import core_tensor
import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.low_rank_add import reference

NAMES = ("base", "x", "inner", "outer", "coefficient")


def _arguments(n, rows, r, d_in, d_out, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n + rows + r + d_in + d_out)
    shapes = ((n * rows, d_out), (n * rows, d_in), (n, r, d_in), (n, r, d_out), (n,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def _explicit(base, x, inner, outer, coefficient, bias):
    """With the matrices of every micro-batch put together."""
    E = coefficient[:, None, None] * (inner.mT @ outer)
    shift = bias * coefficient[:, None, None] * outer.sum(1, keepdim=True)
    return (0.0 if base is None else base) + (x.unflatten(0, (len(E), -1)) @ E + shift).flatten(0, 1)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 130])
@pytest.mark.parametrize("r", [1, 2, 3, 7, 16, 17, 40])
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (3, 10), (31, 8), (65, 67)])
@pytest.mark.parametrize("bias", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["matrix", "row", "nothing"])
def test_equal_to_the_matrices_put_together(rows, r, d_in, d_out, bias, kind):
    matrix, *others = _arguments(2, rows, r, d_in, d_out)
    base = {"matrix": matrix, "row": matrix[0], "nothing": None}[kind]
    arguments = [base, *others]
    expected, before = _explicit(*arguments, bias), [None if t is None else t.clone() for t in arguments]
    out = torch.full_like(matrix, torch.nan)
    reference.low_rank_add(*arguments, bias, out)
    assert_close("reference", out, expected, 1e-13)
    assert_close("native", core_tensor.low_rank_add(*arguments, bias), expected, 1e-13)
    assert all(a is b or torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_lower_precision(dtype, tolerance):
    arguments = _arguments(8, 16, 16, 130, 70, dtype)
    expected = _explicit(*(t.double() for t in arguments), 1.0)
    assert_close("y", core_tensor.low_rank_add(*arguments, 1.0).double(), expected, tolerance)


@pytest.mark.parametrize("r", [16, 40])
def test_in_place(r):
    base, *others = _arguments(2, 5, r, 33, 21)
    expected = _explicit(base, *others, 0.7)
    assert core_tensor.low_rank_add(base, *others, 0.7, out=base) is base
    assert_close("y", base, expected, 1e-13)


def test_views_with_gaps():
    base, x, inner, outer, coefficient = _arguments(3, 6, 5, 20, 30)
    gappy, factors = base.repeat(1, 2), (x[:, ::2], inner[:, :, ::2], outer, coefficient)
    expected = _explicit(gappy[:, ::2], *factors, 0.0)
    assert_close("y", core_tensor.low_rank_add(gappy[:, ::2], *factors), expected, 1e-13)
    expected = _explicit(gappy[:, :30], *factors, 0.0)
    core_tensor.low_rank_add(gappy[:, :30], *factors, out=gappy[:, :30])
    assert_close("out", gappy[:, :30], expected, 1e-13)
    assert torch.equal(gappy[:, 30:], base)


def test_threads_do_not_change_the_result():
    arguments = _arguments(5, 37, 6, 60, 40)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(core_tensor.low_rank_add(*arguments, 1.0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_names_the_argument(name):
    arguments = dict(zip(NAMES, _arguments(2, 3, 2, 4, 5), strict=True))
    with pytest.raises(ValueError, match=f"^{name}: "):
        core_tensor.low_rank_add(**{**arguments, name: arguments[name][..., None]})
    with pytest.raises(TypeError, match=r"^(outer|inner|base|coefficient): " if name == "x" else f"^{name}: "):
        core_tensor.low_rank_add(**{**arguments, name: arguments[name].float()})
    with pytest.raises(TypeError, match=f"^{name}: expected a torch.Tensor"):
        core_tensor.low_rank_add(**{**arguments, name: [1.0]})


def test_bad_results_and_rows():
    arguments = _arguments(2, 3, 2, 4, 5)
    with pytest.raises(ValueError, match=r"^out: expected shape \(6, 5\), got \(5, 6\)"):
        core_tensor.low_rank_add(*arguments, out=torch.empty(5, 6, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"^out: "):
        core_tensor.low_rank_add(*arguments, out=torch.empty(6, 5))
    with pytest.raises(ValueError, match=r"^base: expected shape \(5\), got \(4,\)"):
        core_tensor.low_rank_add(arguments[0][0, :4], *arguments[1:])


@pytest.mark.parametrize(("n", "rows"), [(0, 4), (3, 4)])
def test_rows_that_micro_batches_do_not_divide(n, rows):
    base, x, inner, outer, coefficient = _arguments(1, rows, 2, 4, 5)
    many = inner.expand(n, -1, -1), outer.expand(n, -1, -1), coefficient.expand(n)
    with pytest.raises(ValueError, match=rf"^x: expected rows of {n} micro-batches of one size"):
        core_tensor.low_rank_add(base, x, *many)


def test_micro_batches_without_rows():
    arguments = _arguments(2, 0, 3, 4, 5)
    assert core_tensor.low_rank_add(*arguments).shape == (0, 5)
    reference.low_rank_add(*arguments, 0.0, arguments[0])


@pytest.mark.parametrize("kind", ["matrix", "nothing"])
def test_opcheck(kind):
    base, *others = _arguments(2, 3, 2, 4, 5)
    given = (base if kind == "matrix" else None, *others, 1.0, torch.zeros_like(base))
    torch.library.opcheck(torch.ops.core_tensor.low_rank_add.default, given)
