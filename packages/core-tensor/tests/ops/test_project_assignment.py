from itertools import permutations, product

import core_tensor
import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.project_assignment import reference
from hypothesis import given, settings
from hypothesis import strategies as st


def _vertices(items, slots, filled):
    """Every assignment, as rows of items * slots entries."""
    found = []
    for choice in product([-1, *range(items)], repeat=slots):
        chosen = [i for i in choice if i >= 0]
        if len(set(chosen)) == len(chosen) and (not filled or len(chosen) == slots):
            vertex = torch.zeros(items, slots, dtype=torch.float64)
            for slot, item in enumerate(choice):
                if item >= 0:
                    vertex[item, slot] = 1.0
            found.append(vertex.ravel())
    return torch.stack(found)


def _combination(weights, items, count):
    """The point that weights and items say."""
    x = torch.zeros(count, items.shape[1], dtype=torch.float64)
    for weight, vertex in zip(weights, items, strict=True):
        for slot, item in enumerate(vertex.tolist()):
            if item >= 0:
                x[item, slot] += weight
    return x.ravel()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from([0.1, 1.0, 30.0, 1e4]), st.integers(0, 10**6)
)
def test_no_assignment_improves_and_the_point_is_a_combination(items, slots, filled, size, seed):
    items = max(items, slots) if filled else items
    y = torch.randn(items * slots, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    y = y.round() if seed % 3 == 0 else y  # whole numbers have ties
    offsets = torch.tensor([0, len(y)])
    native = core_tensor.project_assignment(y, offsets, slots, filled=filled, limit=64)
    for x, weights, named in (native, reference.project_assignment(y, offsets, slots, filled, 64)):
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
        assert bool((weights >= 0).all())
        assert_close("point", _combination(weights[0], named[0], items), x, 1e-12)
        gains = (_vertices(items, slots, filled) - x) @ (y - x)  # the projection's variational inequality
        assert float(gains.max()) <= 1e-12 * max(1.0, size**2)


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize(("items", "slots", "size"), [(20, 10, 1e3), (9, 4, 3.0), (33, 1, 1.0), (5, 5, 10.0)])
def test_ragged_blocks_equal_the_reference(filled, items, slots, size):
    generator = torch.Generator().manual_seed(items)
    counts = [items, 0, items + 3, slots, 0]
    offsets = torch.tensor([0, *counts]).cumsum(0) * slots
    y = torch.randn(int(offsets[-1]), generator=generator, dtype=torch.float64) * size
    x, weights, named = core_tensor.project_assignment(y, offsets, slots, filled=filled, limit=24)
    true, mass, _ = reference.project_assignment(y, offsets, slots, filled, 24)
    assert torch.equal(weights.sum(1) > 0, mass.sum(1) > 0)
    assert_close("x", x, true, 1e-10)
    assert named.shape == (5, 24, slots)
    whole = core_tensor.project_assignment(y, offsets, slots, filled=filled, limit=24)
    assert all(map(torch.equal, (x, weights, named), whole))
    first = int(offsets[2])  # a slice of a problem keeps the offsets of the whole
    part = core_tensor.project_assignment(y[first:], offsets[2:], slots, filled=filled, limit=24)[0]
    assert torch.equal(part, x[first:])


def test_a_corral_that_outgrows_its_limit_has_no_weights():
    y = torch.zeros(16, dtype=torch.float64)  # the centre of the polytope needs four assignments
    offsets = torch.tensor([0, 16])
    x, weights, _ = core_tensor.project_assignment(y, offsets, 4, limit=8)
    assert_close("x", x, torch.full((16,), 0.25, dtype=torch.float64), 1e-12)
    assert float(weights.sum()) == pytest.approx(1.0)
    x, weights, _ = core_tensor.project_assignment(y, offsets, 4, limit=2)
    assert float(x.abs().max()) == float(weights.sum()) == 0.0


def test_a_far_point_goes_to_the_best_assignment():
    gain = torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = max(permutations(range(6), 3), key=lambda p: float(gain[list(p), range(3)].sum()))
    for size in (1e6, 1e100):
        _, weights, items = core_tensor.project_assignment(gain.ravel() * size, torch.tensor([0, 18]), 3)
        assert tuple(items[0, 0].tolist()) == best
        assert float(weights[0, 0]) == 1.0


def test_schema_and_fake():
    y = torch.rand(12, dtype=torch.float64)
    arguments = (y, torch.tensor([0, 12]), 3, True, 4)
    torch.library.opcheck(torch.ops.core_tensor.project_assignment.default, arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(6), torch.tensor([0, 6]), 2), TypeError, "values: expected"),
        ((torch.full((6,), torch.nan).double(), torch.tensor([0, 6]), 2), ValueError, "values: expected finite"),
        ((torch.ones(6).double() * 1e200, torch.tensor([0, 6]), 2), ValueError, "values: expected magnitudes"),
        ((torch.ones(6).double(), torch.tensor([0, 5]), 2), ValueError, "offsets: expected rising bounds"),
        ((torch.ones(6).double(), torch.tensor([0, 3, 6]), 2), ValueError, "offsets: expected blocks"),
        ((torch.ones(2).double(), torch.tensor([0, 2]), 2), ValueError, "at least 2 items"),
        ((torch.ones(6).double(), torch.tensor([0, 6]), 0), ValueError, "slots"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        core_tensor.project_assignment(*arguments)


@pytest.mark.parametrize(
    ("values", "bounds", "filled"),
    [
        ([1.0, -torch.inf, 1.0, 1.0], [0, 4], True),
        ([1.0, -1.1e150, 1.0, 1.0], [0, 4], True),
        ([1.0] * 4, [0, 4, 3, 4], True),
        ([1.0] * 4, [-(2**63), 2**63 - 1], True),
        ([1.0] * 4, [0], True),
        ([1.0] * 4, [0, 2, 4], True),
        ([1.0] * 4, [0, 1, 4], False),
    ],
)
def test_the_kernel_refuses_what_the_reference_refuses(values, bounds, filled):
    arguments = (torch.tensor(values, dtype=torch.float64), torch.tensor(bounds), 2, filled, 4)
    with pytest.raises(ValueError, match="expected") as expected:
        reference.project_assignment(*arguments)
    with pytest.raises(ValueError, match="expected") as got:
        torch.ops.core_tensor.project_assignment.default(*arguments)
    assert str(got.value) == str(expected.value)
