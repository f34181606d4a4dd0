import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantease.problem.clip import clip_grid
from quantease.problem.grid import group_index, minmax_grid


def _weights(q, p, seed=0, spread=1.0):
    return torch.randn(q, p, generator=torch.Generator().manual_seed(seed)) * spread


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 7), st.integers(1, 30), st.sampled_from([-1, 1, 4, 7]), st.booleans())
def test_codes_are_the_nearest_points_and_points_keep_their_codes(bits, q, p, group_size, symmetric):
    if symmetric and bits == 1:
        return
    weight = _weights(q, p, seed=p)
    grid = minmax_grid(weight, bits=bits, group=group_index(p, group_size), symmetric=symmetric)
    codes = grid.quantize(weight)
    values = grid.dequantize(codes)
    for i, j in itertools.product(range(q), range(p)):
        g = int(grid.group[j])
        points = grid.scale[i, g] * (torch.arange(2**bits) - grid.zero[i, g])
        assert (values[i, j] - weight[i, j]).abs() <= (points - weight[i, j]).abs().min() + 1e-6
        assert bool((points == 0).any())  # the grid always has a zero
    assert torch.equal(grid.quantize(values), codes)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_minmax_grid_by_hand(scale_dtype):
    weight = torch.tensor([[-1.0, 0.5, 2.5], [1.0, 2.0, 7.0], [0.0, 0.0, 0.0], [-3.0, -3.0, -3.0]])
    grid = minmax_grid(weight, bits=3, group=group_index(3, -1), scale_dtype=scale_dtype)
    expected = torch.tensor([3.5 / 7, 1.0, 2 / 7, 3 / 7]).to(scale_dtype).float()
    assert torch.equal(grid.scale[:, 0], expected)
    assert grid.zero[[0, 1, 3], 0].tolist() == [2.0, 0.0, 7.0]
    values = grid.dequantize(grid.quantize(weight))
    assert torch.equal(values[2], torch.zeros(3))  # a row of zeros stays
    assert torch.allclose(values[3], weight[3], rtol=4e-3)  # so does a constant row
    both = minmax_grid(weight, bits=3, group=group_index(3, -1), symmetric=True, scale_dtype=scale_dtype)
    assert both.zero.unique().tolist() == [4.0]
    assert torch.equal(both.scale[0], torch.tensor([5.0 / 7]).to(scale_dtype).float())


def test_groups_are_runs_with_a_short_last_one():
    assert group_index(7, 3).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert group_index(3, -1).tolist() == [0, 0, 0]
    weight = _weights(4, 7)
    whole = minmax_grid(weight, bits=4, group=group_index(7, 3))
    for g, columns in enumerate((slice(0, 3), slice(3, 6), slice(6, 7))):
        part = minmax_grid(weight[:, columns], bits=4, group=group_index(columns.stop - columns.start, -1))
        assert torch.equal(whole.scale[:, g], part.scale[:, 0])
        assert torch.equal(whole.zero[:, g], part.zero[:, 0])


def test_scales_too_large_for_their_storage_are_refused_and_small_ones_stay_positive():
    group = group_index(3, -1)
    with pytest.raises(ValueError, match="weight: expected steps below"):
        minmax_grid(torch.full((1, 3), 1e7), bits=3, group=group)
    tiny = minmax_grid(torch.full((1, 3), 1e-12), bits=3, group=group)
    assert float(tiny.scale) == 2.0**-24
    assert float(minmax_grid(torch.full((1, 3), 1e30), bits=3, group=group, scale_dtype=torch.float32).scale) > 1e29


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clip_grid_is_never_worse_than_minmax_and_mostly_better(bits, group_size, symmetric):
    generator = torch.Generator().manual_seed(1)
    weight = _weights(20, 512)
    energy = torch.rand(512, generator=generator) + 0.1
    options = {"bits": bits, "group": group_index(512, group_size), "symmetric": symmetric}
    errors = []
    for grid in (minmax_grid(weight, **options), clip_grid(weight, energy, **options)):
        error = (weight - grid.dequantize(grid.quantize(weight))).square() * energy
        errors.append(torch.zeros_like(grid.scale).index_add_(1, grid.group, error))
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    assert float(errors[1].sum()) < 0.95 * float(errors[0].sum())


def test_clip_grid_ignores_masked_positions():
    weight = _weights(5, 32)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, 3] = True
    spoiled = weight.clone()
    spoiled[:, 3] = 1000.0
    options = {"bits": 3, "group": group_index(32, -1), "mask": mask}
    a = clip_grid(weight, torch.ones(32), **options)
    b = clip_grid(spoiled, torch.ones(32), **options)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.zero, b.zero)
