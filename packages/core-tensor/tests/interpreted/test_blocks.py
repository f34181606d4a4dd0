import pytest
import torch
from core_tensor.ops.dual_pass import reference as pass_reference
from core_tensor.ops.project_blocks import reference as project_reference

F64, ROWS = torch.float64, 5
OFFSETS = torch.tensor([0, 3, 3, 4, 11])


def _family(kind, generator):
    n, blocks = int(OFFSETS[-1]), OFFSETS.shape[0] - 1
    upper = None if kind == "simplex" else torch.rand(n, generator=generator, dtype=F64) + 0.3
    cap = torch.rand(blocks, generator=generator, dtype=F64) * 0.3 + 0.1
    if kind == "box":
        cap = torch.full((1,), torch.inf, dtype=F64)
    weight = torch.rand(n, generator=generator, dtype=F64) + 0.5 if kind == "knapsack" else None
    return cap, upper, weight


@pytest.mark.parametrize("kind", ["simplex", "box", "box_cut", "knapsack"])
@pytest.mark.parametrize("equality", [False, True])
def test_project_blocks(kind, equality, monkeypatch):
    from core_tensor.ops.project_blocks import triton as kernels

    monkeypatch.setattr(kernels, "CHUNK", 4)  # the longest block takes two chunks
    monkeypatch.setattr(kernels, "HALVINGS", 50)
    if kind == "box" and equality:
        return
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(int(OFFSETS[-1]), generator=generator, dtype=F64)
    family = _family(kind, generator)
    expected = project_reference.project_blocks(v, OFFSETS, *family, equality)
    assert torch.allclose(kernels.project_blocks(v, OFFSETS, *family, equality), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "equality", "rows_per_variable"),
    [("simplex", False, 1), ("simplex", True, 1), ("box", False, 1), ("box_cut", False, 2), ("knapsack", False, 2)],
)
def test_dual_pass(kind, equality, rows_per_variable, monkeypatch):
    from core_tensor.ops.dual_pass import triton as kernels

    monkeypatch.setattr(kernels, "WIDTHS", (4, 16))  # two launches
    monkeypatch.setattr(kernels, "HALVINGS", 50)
    generator = torch.Generator().manual_seed(5)
    n, several = int(OFFSETS[-1]), rows_per_variable > 1
    shape = (n, rows_per_variable) if several else (n,)
    index = torch.randint(0, ROWS, shape, generator=generator, dtype=torch.int32)
    cost = -torch.rand(n, generator=generator, dtype=F64)
    coefficient = torch.rand(shape, generator=generator, dtype=F64)
    lam, shrink = (torch.rand(ROWS, generator=generator, dtype=F64) for _ in range(2))
    anchor = torch.rand(n, generator=generator, dtype=F64)
    scale, bounds = torch.full((2 * ROWS + 5,), 2.0**40, dtype=F64), torch.tensor([0, 2, 4])
    arguments = (
        OFFSETS, index, cost, coefficient, lam, 0.05, *_family(kind, generator), equality,
        anchor if several or equality else None, shrink if several else None, scale, bounds, True,
    )  # fmt: skip
    (expected, x), (sums, y) = pass_reference.dual_pass(*arguments), kernels.dual_pass(*arguments)
    assert torch.allclose(y, x, atol=1e-11)
    assert torch.allclose(sums.double() / 2**40, expected.double() / 2**40, atol=1e-9)
