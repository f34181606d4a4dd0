"""No number that a kernel follows as an index, an offset or a length may lead outside an array."""

import os
import signal

import core_tensor
import pytest
import torch
from core_tensor import BlockData
from core_tensor.ops.quantized_linear import check_weights

F64, HUGE = torch.float64, 2**62
BAD_INDICES = [-1, -5, 3, 2**30, 2**31, 2**33, -(2**63), 2**63 - 1]


def _block(op, group):
    size, columns = 6, 5
    if op == "cd_sparse":
        codes, gradient = torch.zeros(4, size, dtype=torch.uint8), torch.randn(4, size)
        return core_tensor.cd_sparse(codes, gradient, torch.eye(size), torch.ones(4, 3), group, None, 7)
    weight, square = torch.randn(size, columns), torch.eye(size)
    grid = (torch.ones(3, columns), torch.zeros(3, columns), group)
    if op == "gptq_block":
        return core_tensor.gptq_block(weight, square, *grid, 7)
    return core_tensor.cd_block(weight, weight, weight, square, *grid, None, 7)


@pytest.mark.parametrize("op", ["cd_block", "gptq_block", "cd_sparse"])
@pytest.mark.parametrize("bad", BAD_INDICES)
def test_groups_outside_the_grid_are_refused(op, bad):
    group = torch.tensor([0, 1, 2, 0, 1, bad])
    with pytest.raises(ValueError, match=r"group: expected indices in \[0, 3\), got "):
        _block(op, group)


def _layer(offsets=(0, 1, 3), columns=(2, 0, 15)):
    words = core_tensor.pack_bits(torch.zeros(2, 16, dtype=torch.uint8), 3)
    outliers = (torch.tensor(offsets), torch.tensor(columns, dtype=torch.int32), torch.ones(len(columns)))
    return words, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.uint8), 3, -1, outliers


@pytest.mark.parametrize("tokens", [1, 5, 30])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"columns": (2, 0, 16)}, r"outliers\[1\]: expected indices in \[0, 16\), got 0 to 16"),
        ({"columns": (2, -1, 3)}, r"outliers\[1\]: expected indices in \[0, 16\), got -1 to 3"),
        ({"columns": (2**30, 0, 3)}, r"outliers\[1\]: "),
        ({"offsets": (0, 4, 3)}, r"outliers\[0\]: expected a rising sequence from 0 to 3"),
        ({"offsets": (1, 1, 3)}, r"outliers\[0\]: "),
        ({"offsets": (0, 1, HUGE)}, r"outliers\[0\]: "),
        ({"offsets": (0, -HUGE, 3)}, r"outliers\[0\]: "),
    ],
)
def test_outliers_outside_the_matrix_are_refused(wrong, message, tokens):
    x = torch.randn(tokens, 16)
    core_tensor.quantized_linear(x, *_layer())
    with pytest.raises(ValueError, match=message):
        core_tensor.quantized_linear(x, *_layer(**wrong), check=False)
    with pytest.raises(ValueError, match=message):
        check_weights(16, *_layer(**wrong))


def test_quantized_linear_takes_groups_longer_than_the_input_and_empty_batches():
    words, scale, zero, bits, _, _ = _layer()
    x = torch.randn(3, 16)
    plain = core_tensor.quantized_linear(x, words, scale, zero, bits)
    assert torch.equal(core_tensor.quantized_linear(x, words, scale, zero, bits, 2**40), plain)
    assert core_tensor.quantized_linear(x[:0], words, scale, zero, bits).shape == (0, 2)
    empty = torch.zeros(2, 0, dtype=torch.int32)
    assert torch.equal(core_tensor.quantized_linear(x[:, :0], empty, scale, zero, bits), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="x: expected at least one dimension"):
        core_tensor.quantized_linear(torch.tensor(1.0), words, scale, zero, bits)


def _data(offsets=(0, 2, 5), index=(0, 1, 2, 0, 1), coefficient=1.0):
    n = len(index)
    return BlockData(
        offsets=torch.tensor(offsets),
        index=torch.tensor(index, dtype=torch.int32),
        cost=-torch.ones(n, dtype=F64),
        coefficient=torch.full((n,), coefficient, dtype=F64),
        cap=torch.ones(1, dtype=F64),
        upper=torch.full((1,), 0.4, dtype=F64),
    )


def _pass(data, scale=1.0, bounds=(0, 1, 2)):
    return core_tensor.dual_pass(
        data, torch.zeros(3, dtype=F64), 1.0, torch.full((11,), scale, dtype=F64), torch.tensor(bounds), primal=True
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_data(index=(0, 1, 3, 0, 1)), r"index: expected indices in \[0, 3\), got 0 to 3"),
        (_data(index=(0, 1, -1, 0, 1)), "index: "),
        (_data(offsets=(0, 6, 5)), "offsets: "),
        (_data(offsets=(-1, 2, 4)), r"offsets: expected values in \[0, 2\*\*48\)"),
        (_data(offsets=(HUGE, HUGE + 2, HUGE + 5)), "offsets: expected values in "),
        (_data(offsets=(0, 2, 4)), "offsets: expected a rising sequence from 0 to 5"),
    ],
)
def test_data_of_a_dual_that_point_outside_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        _pass(data)
    with pytest.raises(ValueError, match=message):
        core_tensor.block_curvature(data, torch.full((5,), 0.2, dtype=F64), 3, 1.0)


@pytest.mark.parametrize("bounds", [(0, 3), (0, 2, 1, 2), (-1, 2), (0,), (0, HUGE)])
def test_chunks_outside_the_blocks_are_refused(bounds):
    with pytest.raises(ValueError, match="bounds: expected a rising sequence from 0 to 2"):
        _pass(_data(), bounds=bounds)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scale", [2.0**63, 1e300, -1e300])
def test_fixed_point_without_room_is_refused(scale, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(ValueError, match=r"scale: .*no room in 64 bits"):
            _pass(_data(), scale)
        with pytest.raises(ValueError, match="scale: "):
            core_tensor.block_curvature(_data(), torch.full((5,), 0.2, dtype=F64), 3, scale)
        # every chunk fits, their sum does not: 3 * 0.4 * 2**62 > 2**63 > 2 * 0.4 * 2**62
        with pytest.raises(ValueError, match=r"scale: .*no room in 64 bits"):
            _pass(_data((0, 2, 4, 6), [0] * 6), scale=2.0**62 * 1.3, bounds=(0, 1, 2, 3))
        with pytest.raises(ValueError, match=r"scale: .*no room in 64 bits"):
            core_tensor.block_curvature(_data(coefficient=1e155), torch.full((5,), 0.2, dtype=F64), 3, 2.0**40)
    finally:
        torch.set_num_threads(before)


def test_the_reference_refuses_the_same_fixed_point():
    from core_tensor.ops.dual_pass.reference import add_fixed_point

    total = torch.tensor([2**62, -(2**62), 5])
    add_fixed_point(total, torch.tensor([2.0**61, -(2.0**62), 0.4], dtype=F64))
    assert total.tolist() == [2**62 + 2**61, -(2**63), 5]
    for bad in (2.0**62, 2.0**63, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="no room"):
            add_fixed_point(total.clone(), torch.tensor([bad, 0.0, 0.0], dtype=F64))


def test_dual_bounds_refuses_scales_and_numbers_without_sense():
    sums, scale, lam, b = torch.zeros(11, dtype=torch.int64), torch.ones(11, dtype=F64), *torch.ones(2, 3, dtype=F64)
    for i in (0, 1, 6, 10):
        for bad in (0.0, -1.0, torch.nan):
            wrong = scale.clone()
            wrong[i] = bad
            with pytest.raises(ValueError, match="scale: expected positive"):
                core_tensor.dual_bounds(sums, wrong, lam, b)
    for name in ("lam", "budgets"):
        wrong = torch.tensor([1.0, torch.nan, 1.0], dtype=F64)
        with pytest.raises(ValueError, match=f"{name}: expected finite"):
            core_tensor.dual_bounds(sums, scale, *((wrong, b) if name == "lam" else (lam, wrong)))


@pytest.mark.parametrize("offsets", [(0, 7), (0, 5, 4, 6), (1, 6), (0, -HUGE, 6), (0, HUGE, 6)])
def test_blocks_outside_the_vector_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets: "):
        core_tensor.project_blocks(torch.randn(6, dtype=F64), torch.tensor(offsets), torch.ones(1, dtype=F64))
    with pytest.raises(ValueError, match="offsets: "):
        torch.ops.core_tensor.project_blocks(
            torch.randn(6, dtype=F64), torch.tensor(offsets), torch.ones(1, dtype=F64), None, None, False
        )
    if offsets != (1, 6):  # a run of blocks may keep the offsets of the whole
        with pytest.raises(ValueError, match="offsets: "):
            core_tensor.project_assignment(torch.rand(6, dtype=F64), torch.tensor(offsets), 2)


@pytest.mark.parametrize("name", ["slots", "limit"])
@pytest.mark.parametrize("bad", [0, -1, 2**31, 2**64, 10**400])
def test_counts_of_project_assignment(name, bad):
    with pytest.raises(ValueError, match=f"{name}: "):
        core_tensor.project_assignment(
            torch.rand(6, dtype=F64), torch.tensor([0, 6]), **({"slots": 2, "filled": False} | {name: bad})
        )


def test_pack_bits_finds_a_code_that_is_too_large_wherever_it_stands():
    for rows, columns in ((1, 1), (3, 8), (2, 13), (5, 64)):
        for bits in (1, 3, 7):
            for at in range(0, rows * columns, 3):
                codes = torch.zeros(rows, columns, dtype=torch.uint8)
                codes.view(-1)[at] = 1 << bits
                with pytest.raises(ValueError, match=f"codes: expected values below 2.*, got {1 << bits}"):
                    core_tensor.pack_bits(codes, bits)


@pytest.mark.parametrize("columns", [-1, 2**70, 10**400])
def test_unpack_bits_refuses_counts_that_no_row_holds(columns):
    with pytest.raises(ValueError, match=r"columns: |words: "):
        core_tensor.unpack_bits(torch.zeros(2, 3, dtype=torch.int32), 3, columns)


def test_devices_must_agree():
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    words, scale, zero, bits, _, _ = _layer()
    with pytest.raises(ValueError, match="scale: expected a tensor on cpu, got one on meta"):
        core_tensor.quantized_linear(torch.ones(1, 16), words, scale.to("meta"), zero, bits)
    x, factors = torch.ones(4, 8), torch.ones(2, 3, 8)
    with pytest.raises(ValueError, match="inner: expected a tensor on cpu, got one on meta"):
        core_tensor.low_rank_add(None, x, factors.to("meta"), factors, torch.ones(2))
    with pytest.raises(ValueError, match="right: expected a tensor on cpu, got one on meta"):
        core_tensor.ghost_norms([factors], [factors.to("meta")], [1.0])
    with pytest.raises(TypeError, match=r"codes: expected a dense tensor, got torch\.sparse_coo"):
        core_tensor.pack_bits(codes.to_sparse(), 3)


def test_a_forked_process_does_not_wait_for_its_parents_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        codes = torch.randint(0, 8, (512, 512), dtype=torch.uint8)
        core_tensor.pack_bits(codes, 3)  # starts the team
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            core_tensor.pack_bits(codes, 3)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)
