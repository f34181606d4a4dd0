import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.quantized_gather import dequantize_rows, quantize_rows, quantized_gather, reference
from hypothesis import given, settings
from hypothesis import strategies as st

DIMS = [1, 3, 8, 15, 16, 17, 32, 33, 64, 100, 130]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DIMS), st.integers(1, 50), st.integers(0, 9), st.integers(0, 5), st.sampled_from([1e-6, 1, 1e5]))
def test_one_id_per_field(dim, rows, batch, fields, scale):
    table = quantize_rows(torch.randn(rows, dim) * scale)
    ids = torch.randint(rows, (batch, fields))
    found = quantized_gather(table, ids)
    assert found.shape == (batch, fields * dim)
    assert_close("values", reference.quantized_gather(table, ids, None), found, 1e-6)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dim", "rows"), [(16, 131_072), (16, 131_071), (24, 90_000), (1600, 1400)])
def test_outputs_on_both_sides_of_what_caches_hold(dim, rows, threads):
    table = quantize_rows(torch.randn(50, dim))
    ids = torch.randint(50, (rows, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = quantized_gather(table, ids)
    finally:
        torch.set_num_threads(before)
    assert_close("values", reference.quantized_gather(table, ids, None), found, 1e-6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DIMS), st.lists(st.integers(0, 30), max_size=12))
def test_bags_empty_ones_too(dim, lengths):
    table = quantize_rows(torch.randn(40, dim))
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    ids = torch.randint(40, (int(offsets[-1]),))
    found = quantized_gather(table, ids, offsets)
    assert_close("sums", reference.quantized_gather(table, ids, offsets), found, 1e-5)
    empty = torch.tensor(lengths, dtype=torch.int64) == 0
    assert bool((found[empty] == 0).all())


@pytest.mark.parametrize("shift", [0.0, 1.0, -1000.0])
def test_error_is_half_a_code_in_the_range_of_the_row(shift):
    weight = torch.randn(300, 16) + shift
    table = quantize_rows(weight)
    assert table.shape == (300, 22)
    step = (weight.amax(1) - weight.amin(1)) / 255
    error = (dequantize_rows(table) - weight).abs().amax(1)
    assert bool((error <= 0.5 * step * 1.002 + 1e-6 * abs(shift)).all())  # the scale is rounded up to float16


def test_the_grid_is_that_of_middle_max():
    weight = torch.randn(200, 16)
    low, high = weight.aminmax(dim=1, keepdim=True)
    middle, scale = (128 * high + 127 * low) / 255, (high - low) / 255
    signed = ((weight - middle) / scale).round().clamp(-128, 127)
    codes = quantize_rows(weight)[:, :16].int() - 128
    # float16 rounds the scale by up to 2**-11 of itself, an eighth of a code over 255 codes
    assert int((signed.int() - codes).abs().max()) <= 1
    assert float((signed.int() == codes).float().mean()) > 0.9


def test_constant_rows_are_exact():
    weight = torch.full((3, 8), 0.1)
    assert torch.equal(dequantize_rows(quantize_rows(weight)), weight)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: quantized_gather(t, torch.tensor([[-1]])), ValueError, "ids: .*-1"),
        (lambda t: quantized_gather(t, torch.tensor([[5]])), ValueError, "ids: .*5"),
        (lambda t: quantized_gather(t, torch.tensor([0])), ValueError, "ids: "),
        (lambda t: quantized_gather(t, torch.tensor([[0]], dtype=torch.int32)), TypeError, "ids: "),
        (lambda t: quantized_gather(t, torch.tensor([0, 1]), torch.tensor([0, 3])), ValueError, "offsets: "),
        (lambda t: quantized_gather(t, torch.tensor([0, 1]), torch.tensor([0, 2, 1, 2])), ValueError, "offsets: "),
        (lambda t: quantized_gather(t[:, :6], torch.tensor([[0]])), ValueError, "table: "),
        (lambda _: quantize_rows(torch.tensor([[torch.nan]])), ValueError, "weight: .*finite"),
        (lambda _: quantize_rows(torch.tensor([[0.0, 1e9]])), ValueError, "weight: .*span"),
        (lambda _: quantize_rows(torch.zeros(2, 2, dtype=torch.int64)), TypeError, "weight: "),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(quantize_rows(torch.randn(5, 4)))


@pytest.mark.parametrize("dim", [4, 16, 40])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bad", [-1, 50, 2**62, -(2**63)])
@pytest.mark.parametrize("at", [0, 127, 128, 700, 1199])  # around the rows that the kernel asks for ahead of time
def test_the_operator_itself_refuses_ids_wherever_they_stand(dim, threads, bad, at):
    table = quantize_rows(torch.randn(50, dim))
    ids = torch.arange(1200) % 50
    ids[at] = bad
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for arguments in ((ids[:, None], None), (ids, torch.arange(0, 1201, 2))):
            with pytest.raises(ValueError, match=r"ids: expected indices in \[0, 50\)"):
                torch.ops.core_tensor.quantized_gather(table, *arguments)
    finally:
        torch.set_num_threads(before)


def test_opcheck():
    table = quantize_rows(torch.randn(5, 4))
    operator = torch.ops.core_tensor.quantized_gather.default
    torch.library.opcheck(operator, (table, torch.tensor([[0, 4], [1, 1]]), None))
    torch.library.opcheck(operator, (table, torch.tensor([0, 4]), torch.tensor([0, 0, 2])))
