import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.ghost_norms import reference as norms_reference
from core_tensor.ops.low_rank_add import reference as add_reference


@pytest.mark.parametrize(("n", "rows", "width", "out_width"), [(1, 1, 1, 1), (2, 5, 33, 40), (2, 35, 20, 70)])
def test_ghost_norms(n, rows, width, out_width):
    from core_tensor.ops.ghost_norms import triton as kernels

    g = torch.Generator().manual_seed(rows)
    left = [torch.randn(n, rows, width, generator=g), torch.randn(n, 3, 4, generator=g)]
    right = [torch.randn(n, rows, out_width, generator=g), torch.randn(n, 3, 2, generator=g)]
    wide = norms_reference.ghost_norms([t.double() for t in left], [t.double() for t in right], [1.0, 0.0])
    assert_close("squares", wide, kernels.ghost_norms(left, right, [1.0, 0.0]), 1e-5)


@pytest.mark.parametrize("kind", ["matrix", "row", "none", "in place"])
@pytest.mark.parametrize(("n", "rows", "rank"), [(1, 1, 1), (2, 5, 17), (1, 19, 32)])
def test_low_rank_add(kind, n, rows, rank):
    from core_tensor.ops.low_rank_add import triton as kernels

    g = torch.Generator().manual_seed(rank)
    width, out_width = 35, 43
    x, inner, outer = (
        torch.randn(*s, generator=g) for s in ((n * rows, width), (n, rank, width), (n, rank, out_width))
    )
    c, matrix = torch.rand(n, generator=g), torch.randn(n * rows, out_width, generator=g)
    base = {"matrix": matrix, "row": matrix[0].clone(), "none": None, "in place": matrix.clone()}[kind]
    expected = torch.empty(n * rows, out_width, dtype=torch.float64)
    wide = (None if base is None else base.double(), *(t.double() for t in (x, inner, outer, c)))
    add_reference.low_rank_add(*wide, 0.7, expected)
    y = base if kind == "in place" else torch.empty(n * rows, out_width)
    kernels.low_rank_add(base, x, inner, outer, c, 0.7, y)
    assert_close("y", expected, y, 1e-5)
