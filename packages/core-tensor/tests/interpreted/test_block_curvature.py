import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.block_curvature import cpu, reference
from core_tensor.ops.project_blocks import reference as blocks_reference

F64, ROWS, SCALE = torch.float64, 5, 2.0**45
RATIO = 1e-12  # every term is rounded to 2**-45, in the reference every block: some tens of roundings an entry
LENGTHS = (0, 1, 5, 0, 0, 13, 2, 7, 0)


def _arguments(kind, equality, rows_per_variable, dtype, lengths=LENGTHS, seed=3):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    n, blocks = int(offsets[-1]), len(lengths)
    shape = (n,) if rows_per_variable == 1 else (n, rows_per_variable)
    upper = None if kind == "simplex" else (torch.rand(n, generator=g) * 0.2 + 0.05).to(dtype)
    weight = (torch.rand(n, generator=g) + 0.5).to(dtype) if kind == "knapsack" else None
    each = torch.rand(blocks, generator=g, dtype=F64) * (0.01 if equality else 0.15) + 0.01  # some cuts stay slack
    cap = torch.full((1,), torch.inf, dtype=F64) if kind == "box" else each * offsets.diff()
    v = torch.randn(n, generator=g, dtype=F64) * 0.05 + 0.1
    v[1:4] = v[:1]  # ties
    wide = [None if t is None else t.double() for t in (upper, weight)]
    x = blocks_reference.project_blocks(v, offsets, cap, *wide, equality)
    index = torch.randint(0, ROWS, shape, generator=g, dtype=torch.int32)
    coefficient = torch.randn(shape, generator=g).to(dtype)
    return [offsets, index, coefficient, x, cap, upper, weight, equality, ROWS, SCALE]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rows_per_variable", [1, 3])
@pytest.mark.parametrize(
    ("kind", "equality"),
    [
        ("simplex", False),
        ("simplex", True),
        ("box", False),
        ("box_cut", False),
        ("box_cut", True),
        ("knapsack", False),
        ("knapsack", True),
    ],
)
def test_equals_reference_and_compiled_kernel(kind, equality, rows_per_variable, dtype, monkeypatch):
    from core_tensor.ops.block_curvature import triton as kernels

    monkeypatch.setattr(kernels, "CHUNK", 4)
    monkeypatch.setattr(kernels, "TILE", 4)  # the longest blocks take several tiles
    arguments = _arguments(kind, equality, rows_per_variable, dtype)
    got, expected = kernels.block_curvature(*arguments), reference.block_curvature(*arguments)
    assert bool((expected.diagonal() > 0).all())
    assert_close("curvature", expected, got, RATIO)
    if kind != "knapsack":  # with weights the order in which w'w is summed is the kernel's own
        assert torch.equal(got, cpu.block_curvature(*arguments))


def test_a_block_longer_than_a_chunk():
    from core_tensor.ops.block_curvature import triton as kernels

    arguments = _arguments("knapsack", False, 1, torch.float32, lengths=(131, 1))
    x, upper = arguments[3], arguments[5]
    assert int(((x > 0) & (x < upper)).sum()) > 2 * kernels.TILE
    assert_close("curvature", reference.block_curvature(*arguments), kernels.block_curvature(*arguments), RATIO)


def test_neither_order_nor_slices_change_a_bit():
    from core_tensor.ops.block_curvature import triton as kernels

    offsets, index, a, x, cap, upper, weight, equality, *rest = _arguments("knapsack", False, 2, torch.float32)

    def run(blocks):
        return kernels.block_curvature(
            offsets[blocks.start : blocks.stop + 1],  # of the whole
            *(t[int(offsets[blocks.start]) : int(offsets[blocks.stop])] for t in (index, a, x)),
            cap[blocks.start : blocks.stop],
            *(t[int(offsets[blocks.start]) : int(offsets[blocks.stop])] for t in (upper, weight)),
            equality,
            *rest,
        )

    whole = run(range(len(LENGTHS)))
    assert torch.equal(run(range(6)) + run(range(6, len(LENGTHS))), whole)
    backwards = sum(run(range(i, i + 1)) for i in reversed(range(len(LENGTHS))))
    assert torch.equal(backwards, whole)


def test_vertices_add_nothing_and_equal_shares_are_exact():
    from core_tensor.ops.block_curvature import triton as kernels

    offsets, index = torch.tensor([0, 3, 5, 7, 8]), torch.arange(8, dtype=torch.int32)
    x = torch.tensor([0.0, 1.0, 0.0, 0.5, 0.5, 0.25, 0.25, 0.0], dtype=F64)  # vertex, tight, slack, at its bound
    cap = torch.ones(1, dtype=F64)
    H = torch.zeros(8, 8)
    H[3:5, 3:5] = torch.tensor([[0.5, -0.5], [-0.5, 0.5]])
    H[5, 5] = H[6, 6] = 1.0
    got = kernels.block_curvature(offsets, index, None, x, cap, None, None, False, 8, 2.0**60)
    assert torch.equal(got, (H.double() * 2.0**60).long())
    # one bound for all, at which every x but the quarters stands
    upper = torch.tensor([0.5], dtype=F64)
    got = kernels.block_curvature(offsets, index, None, x.clamp(max=0.5), cap, upper, None, False, 8, 2.0**60)
    H[3:5, 3:5] = 0.0
    assert torch.equal(got, (H.double() * 2.0**60).long())


@pytest.mark.parametrize("scale", [0.5, 1.5, 2.5, 0.49999999999999994, 2.0**51 + 0.5, 2.0**52 + 1, 2.0**53 + 2])
def test_terms_are_rounded_to_even(scale):
    from core_tensor.ops.block_curvature import triton as kernels

    x, cap = torch.ones(1, dtype=F64), torch.full((1,), torch.inf, dtype=F64)
    index, a = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[1.0, -1.0]], dtype=F64)
    got = kernels.block_curvature(torch.tensor([0, 1]), index, a, x, cap, None, None, False, 2, scale)
    whole = int(torch.tensor(scale, dtype=F64).round())
    assert got.tolist() == [[whole, -whole], [-whole, whole]]


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_no_variables(lengths):
    from core_tensor.ops.block_curvature import triton as kernels

    arguments = _arguments("simplex", False, 1, F64, lengths=lengths)
    assert torch.equal(kernels.block_curvature(*arguments), torch.zeros(ROWS, ROWS, dtype=torch.int64))
