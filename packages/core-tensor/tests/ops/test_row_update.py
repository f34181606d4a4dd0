import copy

import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.row_update import reference, row_update
from hypothesis import given, settings
from hypothesis import strategies as st


def tables(rows, dim, kind, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    weight = torch.randn(rows, dim, dtype=dtype)
    moments = (torch.randn(rows, dim, dtype=dtype), torch.rand(rows, dim, dtype=dtype))
    return weight, moments if kind == "adam" else (torch.rand(rows, dtype=dtype),)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["adam", "adagrad"]),
    st.integers(1, 40),
    st.sampled_from([1, 3, 7, 16, 17, 64]),
    st.integers(0, 200),
    st.sampled_from([1e-12, 1.0, 1e6]),
    st.sampled_from([0.0, 0.1]),
)
def test_equal_to_the_reference_in_float64(kind, rows, dim, n, scale, decay):
    weight, state = tables(rows, dim, kind)
    ids, grad = torch.randint(rows, (n,)), torch.randn(n, dim) * scale
    truth = [tensor.double() for tensor in (weight, *state)]
    first = truth[1] if kind == "adam" else None
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": decay, "step": 3}
    before = copy.deepcopy(weight)
    row_update(weight, state, ids, grad, kind=kind, **options)
    if n:
        reference.row_update(truth[0], first, truth[-1], ids, grad.double(), kind, *options.values())
    for name, expected, got in zip(("weight", "state", "state"), truth, (weight, *state), strict=False):
        assert_close(name, expected, got, 3e-6 if scale < 1e6 else 1e-5)
    untouched = torch.ones(rows, dtype=torch.bool).index_fill(0, ids, False)
    assert torch.equal(weight[untouched], before[untouched])


def test_the_first_step_is_that_of_sparse_adam():
    weight, _ = tables(9, 5, "adam")
    ids = torch.tensor([3, 3, 0, 8])
    layer = torch.nn.Embedding.from_pretrained(weight.clone(), freeze=False, sparse=True)
    peer = torch.optim.SparseAdam(layer.parameters(), lr=0.01)
    state = (torch.zeros(9, 5), torch.zeros(9, 5))
    for step in (1, 2, 3):
        grad = torch.randn(4, 5)
        layer.zero_grad()
        (layer(ids) * grad).sum().backward()
        peer.step()
        row_update(weight, state, ids, grad, lr=0.01, step=step)
    assert torch.allclose(weight, layer.weight, atol=1e-6)


def test_any_number_of_threads_gives_the_same_bits():
    found = []
    for threads in (1, 2, 3):
        weight, state = tables(500, 16, "adam")
        ids, grad = torch.randint(500, (9000,), generator=torch.Generator().manual_seed(1)), torch.randn(9000, 16)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(7)
        row_update(weight, state, ids, torch.randn(9000, 16), step=2)
        torch.set_num_threads(before)
        del grad
        found.append(weight)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.tensor([0, -1])}, ValueError, "ids: .*-1"),
        ({"ids": torch.tensor([0, 4])}, ValueError, "ids: .*4"),
        ({"ids": torch.tensor([0, 1 << 40])}, ValueError, "ids: "),
        ({"ids": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "ids: "),
        ({"grad": torch.zeros(3, 2)}, ValueError, "grad: "),
        ({"grad": torch.full((2, 2), torch.inf)}, ValueError, "grad: .*finite"),
        ({"state": (torch.zeros(4, 2),)}, ValueError, "state: "),
        ({"kind": "sgd"}, ValueError, "kind: "),
        ({"step": 0}, ValueError, "step: "),
        ({"beta1": 1.0}, ValueError, "beta1: "),
    ],
)
def test_bad_input_names_the_argument_and_writes_nothing(change, error, message):
    weight = torch.ones(4, 2)
    arguments = {
        "weight": weight,
        "state": (torch.zeros(4, 2), torch.zeros(4, 2)),
        "ids": torch.tensor([0, 1]),
        "grad": torch.ones(2, 2),
    } | change
    with pytest.raises(error, match=message):
        row_update(**arguments)
    assert bool((weight == 1).all())


def test_opcheck():
    weight, (first, second) = tables(5, 3, "adam")
    ids, grad = torch.tensor([1, 4, 1]), torch.randn(3, 3)
    options = (0.1, 0.9, 0.999, 1e-8, 0.0, 1)
    operator = torch.ops.core_tensor.row_update.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (weight, first, second, ids, grad, "adam", *options), test_utils=tests)
    sums = torch.rand(5)
    torch.library.opcheck(operator, (weight, None, sums, ids, grad, "adagrad", *options), test_utils=tests)
