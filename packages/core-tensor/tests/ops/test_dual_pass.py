import dataclasses

import pytest
import torch
from core_tensor import BlockData, dual_pass
from core_tensor.ops.dual_pass import reference
from hypothesis import given, settings
from hypothesis import strategies as st

F64 = torch.float64
ROWS = 5


def _data(kind, lengths, seed, dtype=F64, rows_per_variable=1, equality=False):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths).cumsum(0)])
    n = int(offsets[-1])
    shape = (n,) if rows_per_variable == 1 else (n, rows_per_variable)
    upper = None if kind == "simplex" else torch.rand(n, generator=g).to(dtype) + 0.3
    cap = torch.full((1,), torch.inf, dtype=F64) if kind == "box" else torch.rand(len(lengths), generator=g, dtype=F64)
    if equality:
        cap = cap * 0.25
    return BlockData(
        offsets=offsets,
        index=torch.randint(0, ROWS, shape, generator=g, dtype=torch.int32),
        cost=-torch.rand(n, generator=g).to(dtype),
        coefficient=torch.rand(shape, generator=g).to(dtype),
        cap=cap,
        upper=upper,
        weight=torch.rand(n, generator=g).to(dtype) + 0.5 if kind == "knapsack" else None,
        equality=equality,
    )


def _run(data, lam, gamma, bounds, scale=2.0**40, **given):
    factors = torch.full((2 * ROWS + 5,), scale, dtype=F64)
    native = dual_pass(data, lam, gamma, factors, bounds, primal=True, **given)
    truth = reference.dual_pass(
        data.offsets, data.index, data.cost, data.coefficient, lam, gamma, data.cap, data.upper, data.weight,
        data.equality, given.get("anchor"), given.get("shrink"), factors, bounds, True,
    )  # fmt: skip
    return native, truth


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(["simplex", "box", "box_cut", "knapsack"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sampled_from([1, 3]),
    st.sampled_from([torch.float32, F64]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_equals_reference(kind, lengths, rows_per_variable, dtype, equality, anchored, shrunk, seed):
    data = _data(kind, lengths, seed, dtype, rows_per_variable, equality and kind != "box")
    g = torch.Generator().manual_seed(seed + 1)
    lam = torch.rand(ROWS, generator=g, dtype=F64)
    anchor = torch.rand(data.variables, generator=g).to(dtype) if anchored else None
    shrink = torch.rand(ROWS, generator=g, dtype=F64) if shrunk else None
    bounds = torch.tensor([0, len(lengths) // 2, len(lengths)])
    (sums, x), (truth, y) = _run(data, lam, 0.05, bounds, anchor=anchor, shrink=shrink)
    assert torch.allclose(x, y, atol=1e-11)
    # The last sum counts the nonzeros, which rounding decides where an entry stands exactly at the edge of its support.
    assert torch.allclose(sums[:-1].double() / 2**40, truth[:-1].double() / 2**40, atol=1e-9)
    assert int(sums[-1]) == int((x > 0).sum()) << 40 or shrunk


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("equality", [False, True])
@pytest.mark.parametrize("given", [(), ("anchor",), ("shrink",), ("anchor", "shrink")])
@pytest.mark.parametrize("gamma", [1.0, 1e-3])
def test_blocks_of_every_length_equal_reference(dtype, equality, given, gamma):
    g = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 41, (700,), generator=g)
    lengths[100:250] = 0  # more blocks than a tile takes
    lengths[[0, 300, 699]] = torch.tensor([1500, 1024, 17])  # blocks that are a tile of their own
    data = _data("simplex", lengths.tolist(), 8, dtype, equality=equality)
    cost = torch.round(data.cost * 8) / 8  # ties
    data = dataclasses.replace(data, cost=cost, coefficient=None if gamma == 1.0 else data.coefficient)
    extra = {
        "anchor": torch.rand(data.variables, generator=g).to(dtype),
        "shrink": torch.rand(ROWS, generator=g, dtype=F64),
    }
    lam = torch.rand(ROWS, generator=g, dtype=F64)
    bounds = torch.tensor([0, 1, 90, 420, 700])
    chosen = {name: extra[name] for name in given}
    (sums, x), (truth, y) = _run(data, lam, gamma, bounds, **chosen)
    assert torch.allclose(x, y, atol=1e-11)
    assert torch.allclose(sums[:-2].double() / 2**40, truth[:-2].double() / 2**40, atol=1e-8, rtol=1e-12)
    unwritten = dual_pass(data, lam, gamma, torch.full((2 * ROWS + 5,), 2.0**40, dtype=F64), bounds, **chosen)[0]
    assert torch.equal(unwritten, sums)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("equality", [False, True])
@pytest.mark.parametrize("rows_per_variable", [1, 2])
def test_a_ridge_below_the_spacing_of_floats_takes_the_best_vertex(dtype, equality, rows_per_variable):
    data = _data("simplex", [1, 5, 16, 17, 40], 3, dtype, rows_per_variable, equality)
    lam = torch.zeros(ROWS, dtype=F64)
    x = dual_pass(data, lam, 1e-30, torch.ones(2 * ROWS + 5, dtype=F64), torch.tensor([0, 5]), primal=True)[1]
    for begin, end, cap in zip(data.offsets[:-1], data.offsets[1:], data.cap, strict=True):
        expected = torch.zeros(int(end - begin), dtype=F64)
        expected[data.cost[begin:end].argmin()] = cap
        assert torch.equal(x[begin:end], expected)


@pytest.mark.parametrize("kind", ["simplex", "box_cut"])
def test_bits_do_not_depend_on_threads_or_on_who_takes_which_chunk(kind):
    lengths = torch.randint(0, 30, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    data = _data(kind, lengths, 2, torch.float32)
    lam = torch.rand(ROWS, dtype=F64)
    factors = torch.full((2 * ROWS + 5,), 2.0**40, dtype=F64)
    bounds = torch.tensor([0, 100, 130, 250, 400])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(dual_pass(data, lam, 1e-3, factors, bounds)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    halves = []
    for begin, end, inner in ((0, 130, [0, 100, 130]), (130, 400, [0, 120, 270])):
        v = slice(int(data.offsets[begin]), int(data.offsets[end]))
        part = dataclasses.replace(
            data,
            offsets=data.offsets[begin : end + 1],
            index=data.index[v],
            cost=data.cost[v],
            coefficient=data.coefficient[v],
            cap=data.cap[begin:end],
            upper=None if data.upper is None else data.upper[v],
        )
        halves.append(dual_pass(part, lam, 1e-3, factors, torch.tensor(inner), check=True)[0])
    assert torch.equal(results[0], halves[0] + halves[1])


def test_value_is_the_dual_and_its_gradient_is_the_residual():
    data = _data("box_cut", [4, 7, 2], 9)
    factors = torch.full((2 * ROWS + 5,), 2.0**50, dtype=F64)

    def dual(lam):
        sums = dual_pass(data, lam, 0.1, factors, torch.tensor([0, 3]))[0].double() / 2**50
        load = sums[: 2 * ROWS : 2]
        return float(sums[2 * ROWS] + 0.05 * sums[2 * ROWS + 1] + lam @ load), load

    lam = torch.rand(ROWS, dtype=F64)
    load = dual(lam)[1]
    for j in range(ROWS):
        step = torch.zeros(ROWS, dtype=F64)
        step[j] = 1e-6
        assert (dual(lam + step)[0] - dual(lam - step)[0]) / 2e-6 == pytest.approx(float(load[j]), abs=1e-7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"index": torch.tensor([0, 5, 1], dtype=torch.int32)}, ValueError, r"index: .*\[0, 5\)"),
        ({"index": torch.tensor([0, 1, 1])}, TypeError, "index: .*int32"),
        ({"cost": torch.tensor([0.0, torch.inf, 0.0], dtype=F64)}, ValueError, "cost: .*infinite"),
        ({"coefficient": torch.zeros(2, dtype=F64)}, ValueError, "coefficient: "),
        ({"cap": torch.full((1,), torch.inf, dtype=F64)}, ValueError, "cap: .*finite"),
        ({"offsets": torch.tensor([0, 2, 1, 3])}, ValueError, "offsets: "),
    ],
)
def test_bad_data_names_the_argument(change, error, message):
    data = BlockData(
        offsets=torch.tensor([0, 1, 2, 3]),
        index=torch.zeros(3, dtype=torch.int32),
        cost=torch.zeros(3, dtype=F64),
        coefficient=torch.ones(3, dtype=F64),
        cap=torch.ones(1, dtype=F64),
    )
    with pytest.raises(error, match=message):
        dataclasses.replace(data, **change).check(5)


def test_bad_call_names_the_argument():
    data = _data("simplex", [2, 3], 1)
    factors, bounds = torch.ones(2 * ROWS + 5, dtype=F64), torch.tensor([0, 2])
    lam = torch.zeros(ROWS, dtype=F64)
    with pytest.raises(ValueError, match="gamma: "):
        dual_pass(data, lam, 0.0, factors, bounds)
    with pytest.raises(ValueError, match=r"lam: .*NaN"):
        dual_pass(data, lam * torch.nan, 1.0, factors, bounds)
    with pytest.raises(ValueError, match="bounds: "):
        dual_pass(data, lam, 1.0, factors, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="scale: "):
        dual_pass(data, lam, 1.0, factors[1:], bounds)


def test_opcheck():
    data = _data("simplex", [4, 7, 2], 9)
    factors = torch.full((2 * ROWS + 5,), 2.0**40, dtype=F64)
    torch.library.opcheck(
        torch.ops.core_tensor.dual_pass.default,
        (data.offsets, data.index, data.cost, data.coefficient, torch.rand(ROWS, dtype=F64), 0.1, data.cap, None, None,
         False, None, None, factors, torch.tensor([0, 3]), True),
    )  # fmt: skip
