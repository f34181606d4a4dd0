import math
from itertools import permutations

import core_tensor
import pytest
import torch
from core_tensor.dev.testing import AWKWARD_SIZES
from core_tensor.ops.assignment import reference
from hypothesis import given, settings
from hypothesis import strategies as st


def _total(cost, columns):
    assert sorted(columns.tolist()) == list(range(cost.shape[0]))
    return float(cost.gather(1, columns[:, None]).sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6), st.booleans())
def test_equal_to_brute_force(n, seed, whole):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randn(n, n, generator=generator, dtype=torch.float64)
    cost = cost.round() if whole else cost  # whole numbers have ties
    best = min(sum(float(cost[i, p[i]]) for i in range(n)) for p in permutations(range(n)))
    for solve in (core_tensor.assignment, lambda c: reference.assignment(c[None])[0]):
        assert _total(cost, solve(cost)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("n", AWKWARD_SIZES[:7])  # beyond 64 the reference takes seconds
@pytest.mark.parametrize("kind", ["distances", "uniform", "ties", "collapsed", "negative"])
def test_equal_to_reference(n, kind):
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    cost = {
        "distances": torch.cdist(x, y).square(),
        "uniform": torch.rand(n, n, generator=generator, dtype=torch.float64),
        "ties": torch.randint(0, 3, (n, n), generator=generator).double(),
        "collapsed": torch.cdist(x[:1].expand(n, 5), y).square(),
        "negative": -torch.cdist(x, y),
    }[kind]
    truth = _total(cost, reference.assignment(cost[None])[0])
    assert _total(cost, core_tensor.assignment(cost)) == pytest.approx(truth, rel=1e-12, abs=1e-12)


def test_one_dominant_entry_and_scales():
    cost = torch.rand(33, 33, dtype=torch.float64)
    plain = core_tensor.assignment(cost)
    for scale in (1e-300, 1e-30, 1e30, 1e300):
        assert torch.equal(core_tensor.assignment(cost * scale), plain)
    cost[range(33), plain] = 1e12  # the old choice is out of the question now
    assert not bool((core_tensor.assignment(cost) == plain).any())


def test_batches_devices_and_dtypes():
    cost = torch.rand(4, 9, 9)
    columns = core_tensor.assignment(cost)
    for matrix, found in zip(cost, columns, strict=True):
        assert torch.equal(core_tensor.assignment(matrix), found)
    assert core_tensor.assignment(cost.bfloat16()).shape == (4, 9)
    assert core_tensor.assignment(torch.rand(0, 0)).shape == (0,)
    assert core_tensor.assignment(torch.rand(3, 0, 0)).shape == (3, 0)
    assert torch.equal(core_tensor.assignment(cost.mT.contiguous().mT), columns)


def test_schema_and_fake():
    torch.library.opcheck(torch.ops.core_tensor.assignment.default, (torch.rand(2, 5, 5, dtype=torch.float64),))


@pytest.mark.parametrize(
    ("cost", "error", "message"),
    [
        (torch.rand(3, 4), ValueError, r"cost: expected shape \(n, n\)"),
        (torch.rand(3), ValueError, r"cost: expected shape \(n, n\)"),
        (torch.full((2, 2), math.nan), ValueError, "cost: expected finite"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "cost: expected floating"),
    ],
)
def test_bad_input(cost, error, message):
    with pytest.raises(error, match=message):
        core_tensor.assignment(cost)
