import dataclasses

import pytest
import torch
from core_tensor import BlockData, block_curvature
from core_tensor.ops.block_curvature import reference
from core_tensor.ops.project_blocks import reference as blocks_reference
from hypothesis import given, settings
from hypothesis import strategies as st

F64, ROWS, SCALE = torch.float64, 6, 2.0**45


def _data(kind, lengths, seed, dtype=F64, rows_per_variable=1, equality=False):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths).cumsum(0)])
    n = int(offsets[-1])
    shape = (n,) if rows_per_variable == 1 else (n, rows_per_variable)
    upper = None if kind == "simplex" else (torch.rand(n, generator=g) + 0.3).to(dtype)
    cap = torch.full((1,), torch.inf, dtype=F64) if kind == "box" else torch.rand(len(lengths), generator=g, dtype=F64)
    weight = (torch.rand(n, generator=g) + 0.5).to(dtype) if kind == "knapsack" else None
    data = BlockData(
        offsets=offsets,
        index=torch.randint(0, ROWS, shape, generator=g, dtype=torch.int32),
        cost=torch.zeros(n, dtype=dtype),
        coefficient=torch.rand(shape, generator=g).to(dtype),
        cap=cap * (0.15 if equality else 1.0),  # within reach of the smallest upper bound and weight
        upper=upper,
        weight=weight,
        equality=equality,
    )
    wide = [None if t is None else t.double() for t in (data.upper, data.weight)]
    v = torch.randn(n, generator=g, dtype=F64)
    return data, blocks_reference.project_blocks(v, offsets, data.cap, *wide, equality)


def _truth(data, x):
    d = data
    return reference.block_curvature(
        d.offsets, d.index, d.coefficient, x, d.cap, d.upper, d.weight, d.equality, ROWS, SCALE
    )


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["simplex", "box", "box_cut", "knapsack"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sampled_from([1, 3]),
    st.sampled_from([torch.float32, F64]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_equals_reference(kind, lengths, rows_per_variable, dtype, equality, seed):
    data, x = _data(kind, lengths, seed, dtype, rows_per_variable, equality and kind != "box")
    H = block_curvature(data, x, ROWS, SCALE).double() / SCALE
    assert torch.allclose(H, _truth(data, x).double() / SCALE, atol=1e-11)
    assert torch.allclose(H, H.T, atol=1e-12)
    assert float(torch.linalg.eigvalsh((H + H.T) / 2).min()) > -1e-10


def test_bits_do_not_depend_on_threads_or_on_how_blocks_are_dealt_out():
    lengths = torch.randint(0, 12, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    data, x = _data("box_cut", lengths, 2, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(block_curvature(data, x, ROWS, SCALE))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    total = torch.zeros_like(results[0])
    for begin, end in ((0, 130), (130, 300)):
        v = slice(int(data.offsets[begin]), int(data.offsets[end]))
        part = dataclasses.replace(
            data,
            offsets=data.offsets[begin : end + 1],
            index=data.index[v],
            cost=data.cost[v],
            coefficient=data.coefficient[v],
            cap=data.cap[begin:end],
            upper=data.upper[v],
        )
        total += block_curvature(part, x[v], ROWS, SCALE)
    assert torch.equal(total, results[0])


def test_bad_calls_name_the_argument():
    data, x = _data("simplex", [2, 3], 1)
    with pytest.raises(ValueError, match="x: "):
        block_curvature(data, x[1:], ROWS, SCALE)
    with pytest.raises(ValueError, match=r"index: .*\[0, 1\)"):
        block_curvature(data, x, 1, SCALE)
    with pytest.raises(ValueError, match="scale: "):
        block_curvature(data, x, ROWS, 0.0)


def test_opcheck():
    data, x = _data("box_cut", [4, 7, 2], 9)
    torch.library.opcheck(
        torch.ops.core_tensor.block_curvature.default,
        (data.offsets, data.index, data.coefficient, x, data.cap, data.upper, None, False, ROWS, SCALE),
    )
