import itertools
from fractions import Fraction

import core_tensor
import pytest
import torch
from core_tensor.ops.project_blocks import reference
from hypothesis import given, settings
from hypothesis import strategies as st

F64 = torch.float64


def _family(kind, lengths, seed, scale=1.0, ties=False):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths).cumsum(0)])
    n, blocks = int(offsets[-1]), len(lengths)
    v = torch.randn(n, dtype=F64, generator=g) * scale
    if ties:
        v = v.round()
    cap = torch.rand(blocks, dtype=F64, generator=g) * 2 + 0.01
    upper = None if kind == "simplex" else torch.rand(n, dtype=F64, generator=g) + 0.05
    weight = torch.rand(n, dtype=F64, generator=g) + 0.1 if kind == "knapsack" else None
    if kind == "box":
        cap = torch.full((1,), torch.inf, dtype=F64)
    return v, offsets, cap, upper, weight


def _feasible_cap(offsets, cap, upper, weight, n):
    return torch.minimum(cap, 0.9 * reference.reach(n, offsets, cap, upper, weight))


def _kkt(v, x, offsets, cap, upper, weight, equality):
    """Largest KKT residual: bounds, cut, complementarity, and one multiplier that explains every free entry."""
    worst = 0.0
    block = reference.block_of(offsets)
    for i in range(offsets.shape[0] - 1):
        at = slice(int(offsets[i]), int(offsets[i + 1]))
        if at.start == at.stop:
            continue
        d = float(cap[i if cap.shape[0] > 1 else 0])
        w = torch.ones_like(x[at]) if weight is None else weight[at]
        u = torch.full_like(x[at], torch.inf) if upper is None else upper[at]
        xi, vi = x[at], v[at]
        used = float((w * xi).sum())
        scale = max(1.0, float(vi.abs().max()))
        worst = max(worst, float((-xi).max()), float((xi - u).max()), abs(used - d) if equality else used - d)
        edge = 1e-13 * scale  # an entry within rounding of a bound stands at it: it says nothing of the multiplier
        at_zero, at_upper = xi <= edge, xi >= u - edge
        free = ~at_zero & ~at_upper
        theta = float(((vi - xi) / w)[free].mean()) if bool(free.any()) else None
        if theta is None:  # any multiplier between what entries at 0 and at u allow
            low = max([float(t) for t in (vi / w)[at_zero]], default=-torch.inf)
            high = min([float(t) for t in ((vi - u) / w)[at_upper]], default=torch.inf)
            low = low if equality else max(low, 0.0)
            worst = max(worst, (low - high) / scale)
            continue
        worst = max(worst, float((vi - theta * w - xi)[free].abs().max()) / scale)
        worst = max(worst, float((vi - theta * w)[at_zero].max() if bool(at_zero.any()) else 0.0) / scale)
        worst = max(worst, float((u - vi + theta * w)[at_upper].max() if bool(at_upper.any()) else 0.0) / scale)
        if not equality:
            worst = max(worst, -theta / scale, theta * (d - used) / scale)
    assert block.shape == x.shape
    return worst


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["simplex", "box", "box_cut", "knapsack"]),
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.integers(0, 10**6),
)
def test_kkt_residual_and_reference(kind, lengths, equality, ties, scale, seed):
    v, offsets, cap, upper, weight = _family(kind, lengths, seed, scale, ties)
    if equality:
        if kind == "box":
            return
        cap = _feasible_cap(offsets, cap, upper, weight, v.shape[0])
    x = core_tensor.project_blocks(v, offsets, cap, upper, weight, equality=equality)
    assert _kkt(v, x, offsets, cap, upper, weight, equality) <= 1e-12 * max(1.0, 0.01 * scale)
    truth = reference.project_blocks(v, offsets, cap, upper, weight, equality)
    assert torch.allclose(x, truth, atol=1e-11 * max(1.0, scale), rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=6), st.integers(1, 5), st.booleans())
def test_simplex_equals_enumeration_in_fractions(values, z, equality):
    best = None
    v = [Fraction(a) for a in values]
    for size in range(len(v) + 1):
        for support in itertools.combinations(range(len(v)), size):
            for tight in {True, equality}:
                if tight and not support:
                    continue
                theta = (sum(v[k] for k in support) - z) / len(support) if tight else Fraction(0)
                x = [v[k] - theta if k in support else Fraction(0) for k in range(len(v))]
                if min(x) < 0 or sum(x) > z or (equality and sum(x) != z):
                    continue
                distance = sum((a - b) ** 2 for a, b in zip(v, x, strict=True))
                if best is None or distance < best[0]:
                    best = (distance, x)
    got = core_tensor.project_blocks(
        torch.tensor(values, dtype=F64),
        torch.tensor([0, len(v)]),
        torch.tensor([z], dtype=F64),
        equality=equality,
    )
    assert torch.allclose(got, torch.tensor([float(a) for a in best[1]], dtype=F64), atol=1e-14)


@pytest.mark.parametrize("kind", ["simplex", "box", "box_cut", "knapsack"])
def test_gradient_by_finite_differences(kind):
    v, offsets, cap, upper, weight = _family(kind, [5, 3, 1], 3)
    v.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t: core_tensor.project_blocks(t, offsets, cap, upper, weight), (v,), eps=1e-7
    )


@pytest.mark.parametrize("kind", ["simplex", "box", "box_cut", "knapsack"])
def test_minimiser_is_the_limit_of_far_projections(kind):
    r, offsets, cap, upper, weight = _family(kind, [4, 6, 1], 5)
    vertex = reference.minimiser(r, offsets, cap, upper, weight, False)
    far = core_tensor.project_blocks(-1e7 * r, offsets, cap, upper, weight)
    assert torch.allclose(vertex, far, atol=1e-6)
    assert torch.allclose(
        reference.least_value(r, offsets, cap, upper, weight, False),
        reference.sums(r * far, reference.block_of(offsets), 3),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.tensor([0.0, torch.nan], dtype=F64)}, ValueError, "values: .*NaN"),
        ({"values": torch.zeros(2)}, TypeError, "values: .*float64"),
        ({"offsets": torch.tensor([0, 3])}, ValueError, "offsets: "),
        ({"cap": torch.tensor([-1.0], dtype=F64)}, ValueError, "cap: .*at least 0"),
        ({"cap": torch.ones(3, dtype=F64)}, ValueError, r"cap: expected shape \(1,\)"),
        ({"upper": torch.tensor([-1.0], dtype=F64)}, ValueError, "upper: "),
        ({"weight": torch.zeros(2, dtype=F64)}, ValueError, "weight: .*positive"),
        ({"upper": torch.full((1,), 0.2, dtype=F64), "equality": True}, ValueError, "block 0 must sum to 1"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    given = {
        "values": torch.zeros(2, dtype=F64),
        "offsets": torch.tensor([0, 2]),
        "cap": torch.ones(1, dtype=F64),
        "upper": None,
        "weight": None,
        "equality": False,
    } | change
    with pytest.raises(error, match=message):
        core_tensor.project_blocks(**given)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at the gradient of its own copies
def test_opcheck():
    v, offsets, cap, upper, weight = _family("knapsack", [5, 3], 3)
    torch.library.opcheck(
        torch.ops.core_tensor.project_blocks.default,
        (v.requires_grad_(), offsets, cap, upper, weight, False),
    )
