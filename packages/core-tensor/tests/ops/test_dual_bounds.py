import core_tensor
import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.dual_bounds import BOUNDS, reference


def _arguments(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(10, 30, (2 * rows + 5,), generator=generator).double())
    sums = (torch.randn(2 * rows + 5, generator=generator, dtype=torch.float64) * scale).long()
    lam, budgets = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    return sums, scale, lam, budgets


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 31, 1000])
@pytest.mark.parametrize("with_equations", [False, True])
def test_equal_to_the_reference(rows, with_equations):
    sums, scale, lam, budgets = _arguments(rows, seed=rows)
    free = (torch.arange(rows) % 3 == 0) if with_equations else None
    gradient, shrink, found = core_tensor.dual_bounds(sums, scale, lam, budgets, free=free, keep=0.9)
    true, factors, numbers = reference.dual_bounds(sums, scale, lam, budgets, free, 0.9)
    assert torch.equal(gradient, true)
    assert torch.equal(shrink, factors)
    assert tuple(found) == BOUNDS
    assert_close("numbers", torch.tensor(list(found.values()), dtype=torch.float64), numbers, 1e-13)


def test_the_repair_keeps_every_budget_and_touches_no_other_row():
    load, budgets = torch.tensor([2.0, 1.0, 0.0, 5.0]).double(), torch.tensor([1.0, 1.5, 0.0, 0.0]).double()
    sums = torch.zeros(13, dtype=torch.int64)
    sums[:8:2] = (load * 8).long()
    sums[1:8:2] = 8
    found = core_tensor.dual_bounds(sums, torch.full((13,), 8.0).double(), torch.zeros(4).double(), budgets)
    assert torch.equal(found[0], load - budgets)
    assert found[1].tolist() == [0.5, 1.0, 1.0, 0.0]
    assert found[2]["repaired"] == 0.5 + 1.0 + 1.0 + 0.0
    assert found[2]["violation"] == 5.0


@pytest.mark.parametrize(
    ("position", "wrong", "error"),
    [
        (0, torch.zeros(11), TypeError),
        (0, torch.zeros(12).long(), ValueError),
        (1, torch.zeros(11), TypeError),
        (2, torch.zeros(3), TypeError),
        (3, torch.zeros(4).double(), ValueError),
    ],
)
def test_bad_input_names_the_argument(position, wrong, error):
    arguments = list(_arguments(3))
    arguments[position] = wrong
    with pytest.raises(error, match=f"^{('sums', 'scale', 'lam', 'budgets')[position]}: "):
        core_tensor.dual_bounds(*arguments)


def test_opcheck():
    torch.library.opcheck(torch.ops.core_tensor.dual_bounds.default, (*_arguments(4), None, 1.0))
    torch.library.opcheck(torch.ops.core_tensor.dual_bounds.default, (*_arguments(4), torch.ones(4).bool(), 0.9))
