import math

import numpy as np
import pytest
import torch
from core_tensor.dev.testing import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from lirank.layers.cross import CrossNetwork
from lirank.layers.experts import KINDS, MultiTask
from lirank.layers.gate import LHUC, DenseGate
from lirank.layers.history import HistoryTransformer
from lirank.layers.isotonic import IsotonicLayer
from lirank.layers.mlp import GATES, MLP
from lirank.layers.position_bias import PositionBias
from lirank.layers.residual_cross import ResidualCross
from lirank.layers.table import FusedTable
from lirank.train.row_optimizers import RowOptimizer


def test_full_cross_is_the_formula():
    torch.manual_seed(0)
    layer, x = CrossNetwork(5, 2), torch.randn(3, 5)
    first = x * (x @ layer.maps[0].weight.T + layer.maps[0].bias) + x
    second = x * (first @ layer.maps[1].weight.T + layer.maps[1].bias) + first
    assert torch.allclose(layer(x), second, atol=1e-6)


def test_low_rank_cross_is_the_full_one_of_the_product():
    torch.manual_seed(0)
    low, full, x = CrossNetwork(6, 2, rank=2), CrossNetwork(6, 2), torch.randn(4, 6)
    with torch.no_grad():
        for a, b in zip(low.maps, full.maps, strict=True):
            b.weight.copy_(a[1].weight @ a[0].weight)
            b.bias.copy_(a[1].bias)
    assert torch.allclose(low(x), full(x), atol=1e-6)


@pytest.mark.parametrize("score", ["rank", "heads"])
def test_residual_cross_starts_as_the_plain_one(score):
    torch.manual_seed(0)
    residual, plain, x = ResidualCross(6, 2, 4, score=score, heads=2), CrossNetwork(6, 2, rank=4), torch.randn(5, 6)
    with torch.no_grad():
        for l in range(2):
            plain.maps[l][0].weight.copy_(residual.down[l].weight[8:])  # v
            plain.maps[l][1].load_state_dict(residual.up[l].state_dict())
    assert torch.allclose(residual(x), plain(x), atol=1e-6)
    with torch.no_grad():
        residual.alpha.fill_(0.7)
    assert not torch.allclose(residual(x), plain(x), atol=1e-3)


def test_residual_cross_is_the_formula():
    torch.manual_seed(0)
    layer, x = ResidualCross(6, 1, 4, temperature=2.0), torch.randn(1, 6)
    with torch.no_grad():
        layer.alpha.fill_(0.5)
    q, k, v = (layer.down[0].weight[i : i + 4] @ x[0] for i in (0, 4, 8))
    A = torch.softmax(torch.outer(q, k) / 2.0, 1)
    c = v + 0.5 * A @ v
    expected = x[0] * (layer.up[0].weight @ c + layer.up[0].bias) + x[0]
    assert torch.allclose(layer(x)[0], expected, atol=1e-6)


def test_gates_start_as_the_identity():
    h, side = torch.randn(4, 6), torch.randn(4, 3)
    assert torch.equal(DenseGate(6)(h), h)
    assert torch.equal(DenseGate(6, full=False)(h), h)
    assert torch.equal(LHUC(6, 3)(h, side), h)


@pytest.mark.parametrize("gate", GATES)
def test_a_gated_mlp_starts_as_the_plain_one(gate):
    torch.manual_seed(0)
    plain = MLP(5, (7, 3))
    gated = MLP(5, (7, 3), gate=gate)
    gated.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(4, 5)
    assert torch.allclose(gated(x), plain(x), atol=1e-6)


# --- history


def history(**options):
    torch.manual_seed(0)
    layer = HistoryTransformer(4, 8, width=8, **options).eval()
    items, actions = torch.randn(3, 6, 4), torch.randint(3, (3, 6))
    return layer, items, actions, torch.tensor([6, 0, 3]), torch.randn(3, 4)


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_what_stands_behind_the_end_of_a_history_changes_nothing(fusion):  # DeepCTR-Torch#128
    layer, items, actions, lengths, candidate = history(fusion=fusion, layers=2)
    expected = layer(items, actions, lengths, candidate)
    filled = torch.where(torch.arange(6)[None, :, None] < lengths[:, None, None], items, torch.inf)
    assert torch.equal(layer(filled, actions, lengths, candidate), expected)
    shorter = layer(items[2:, :3], actions[2:, :3], lengths[2:], candidate[2:])
    assert torch.allclose(shorter, expected[2:], atol=1e-6)
    assert bool(torch.isfinite(expected).all())


def test_histories_of_no_one_and_500_events_in_one_batch():  # DeepCTR-Torch#128
    torch.manual_seed(0)
    layer = HistoryTransformer(4, 500, width=8).eval()
    items, actions, candidate = torch.randn(3, 500, 4), torch.randint(3, (3, 500)), torch.randn(3, 4)
    together = layer(items, actions, torch.tensor([0, 1, 500]), candidate)
    for row, length in enumerate((0, 1, 500)):
        one = slice(row, row + 1)
        alone = layer(items[one, :length], actions[one, :length], torch.tensor([length]), candidate[one])
        assert torch.allclose(alone, together[one], atol=1e-5)


def test_early_fusion_sees_the_candidate_in_the_history_late_fusion_does_not():
    for fusion, differs in (("early", True), ("late", False)):
        layer, items, actions, lengths, candidate = history(fusion=fusion)
        found, other = layer(items, actions, lengths, candidate), layer(items, actions, lengths, candidate + 1)
        assert torch.allclose(found, other) is not differs


def test_order_and_actions_matter():
    layer, items, actions, lengths, candidate = history()
    found = layer(items, actions, lengths, candidate)
    assert not torch.allclose(layer(items.flip(1), actions.flip(1), lengths, candidate)[0], found[0])
    assert not torch.allclose(layer(items, (actions + 1) % 3, lengths, candidate)[0], found[0])


# --- tasks


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_have_gradients_and_share_as_they_should(kind):
    torch.manual_seed(0)
    layer = MultiTask(5, ["a", "a", "b"], kind, widths=(4,), experts=2, gate_dropout=0.3).train()
    out = layer(torch.randn(6, 5))
    assert out.shape == (6, 3)
    out[:, 2].sum().backward()
    touched = {
        name.split(".")[1]
        for name, p in layer.named_parameters()
        if name.startswith("own") and p.grad is not None and bool(p.grad.any())
    }
    assert touched == {"shared": {"0"}, "grouped": {"1"}, "mmoe": set(), "ple": {"1"}}[kind]


def test_mmoe_with_one_expert_is_the_shared_tower():
    torch.manual_seed(0)
    mixture, shared = MultiTask(5, ["a", "b"], "mmoe", widths=(4,), experts=1), MultiTask(5, ["a", "b"], widths=(4,))
    shared.own[0][0].load_state_dict(mixture.common[0].state_dict())
    shared.heads.load_state_dict(mixture.heads.state_dict())
    x = torch.randn(3, 5)
    assert torch.allclose(mixture(x), shared(x), atol=1e-6)


def test_position_zero_is_the_reference():
    layer = PositionBias(4, 2)
    torch.nn.init.normal_(layer.bias)
    found = layer(torch.tensor([0, 3, 99]))
    assert bool((found[0] == 0).all())
    assert torch.equal(found[1], found[2])


# --- the isotonic layer


def dense_form(layer, logits):
    """The paper's form: a row of bucket activations per logit."""
    y = logits.double().clamp(layer.low, layer.high) - layer.low
    edges = torch.arange(layer.buckets, dtype=torch.float64) * layer.step
    activation = (y[:, None] - edges).clamp(0, layer.step)  # s below the bucket, the rest in it, 0 above
    return activation @ layer.slope.double().clamp_min(0) + layer.bias.double()


def test_prefix_sums_equal_the_dense_form_with_every_gradient():
    torch.manual_seed(0)
    layer = IsotonicLayer(37, -3.0, 5.0)
    torch.nn.init.normal_(layer.slope, 0.5, 0.7)
    logits = torch.cat([torch.randn(200) * 3, torch.tensor([-3.0, 5.0, -99.0, 99.0, 0.0])]).requires_grad_()
    weight = torch.randn(205)
    grads = []
    for form in (layer, lambda z: dense_form(layer, z)):
        out = form(logits)
        inputs = (logits, layer.slope, layer.bias)
        grads.append((out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)))
    assert_close("values", grads[1][0], grads[0][0], 1e-6)
    inside = (logits.detach() > -3) & (logits.detach() < 5) & (logits.detach() != 0)
    assert_close("logits", grads[1][1][inside], grads[0][1][inside], 1e-5)
    assert_close("slopes", grads[1][2], grads[0][2], 1e-5)
    assert_close("bias", grads[1][3], grads[0][3], 1e-5)


def test_it_starts_as_the_identity_and_clips():
    layer = IsotonicLayer(100, -12.0, 8.0)
    z = torch.linspace(-12, 8, 1001)
    assert torch.allclose(layer(z), z, atol=1e-4)
    found = layer(torch.tensor([-50.0, 50.0, math.nan]))
    assert torch.allclose(found[:2], torch.tensor([-12.0, 8.0]), atol=1e-4)
    assert bool(found[2].isnan())


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 30), st.integers(0, 1000), st.booleans(), st.lists(st.floats(-30, 30), min_size=2, max_size=30))
def test_it_is_monotone_whatever_the_weights(buckets, seed, contexts, logits):
    torch.manual_seed(seed)
    layer = IsotonicLayer(buckets, -5.0, 5.0, contexts=3 if contexts else 0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    z = torch.tensor(logits, dtype=torch.float64).sort().values
    for c in range(3 if contexts else 1):
        context = torch.full((len(z),), c) if contexts else None
        assert bool((layer(z, context).diff() >= -1e-9).all())


def test_contexts_have_curves_of_their_own():
    layer = IsotonicLayer(10, -5.0, 5.0, contexts=2)
    with torch.no_grad():
        layer.context_slope[1] += 1.0
        layer.context_bias[1] += 5.0
    z = torch.tensor([1.0, 1.0])
    assert torch.allclose(layer(z, torch.tensor([0, 1])), torch.tensor([1.0, 12.0]), atol=1e-5)
    for context in (None, torch.tensor([0, 2]), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match="context"):
            layer(z, context)


def test_set_curve_and_bad_curves():
    layer = IsotonicLayer(200, -10.0, 10.0)
    edges = torch.tensor([-8.0, 0.0, 6.0])
    layer.set_curve(edges, torch.tensor([-6.0, 1.0, 2.0]))
    assert torch.allclose(layer(edges), torch.tensor([-6.0, 1.0, 2.0]), atol=1e-4)
    assert torch.allclose(layer(torch.tensor([-4.0, 3.0])), torch.tensor([-2.5, 1.5]), atol=1e-4)
    with pytest.raises(ValueError, match="never falls"):
        layer.set_curve(edges, torch.tensor([1.0, 0.0, 2.0]))
    with pytest.raises(ValueError, match="high"):
        IsotonicLayer(10, 1.0, 1.0)


# --- the table


def test_a_lazy_table_trains_like_an_embedding():
    torch.manual_seed(0)
    table = FusedTable(20, 4).double()
    twin = torch.nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False, sparse=True)
    options = {"lr": 0.1, "eps": 1e-20}  # torch adds eps before its bias correction
    ours, theirs = RowOptimizer(table, **options), torch.optim.SparseAdam(twin.parameters(), **options)
    for _ in range(4):
        ids, weight = torch.randint(20, (6, 3)), torch.randn(6, 3, 4, dtype=torch.float64)
        twin.zero_grad()
        (twin(ids) * weight).sum().backward()
        theirs.step()
        (table(ids) * weight).sum().backward()
        ours.step(table.take_touched())
    assert torch.allclose(table.weight, twin.weight, rtol=0, atol=1e-9)


def test_rows_that_no_batch_touches_keep_weight_and_state():  # pytorch#82486
    table = FusedTable(10, 4)
    optimizer = RowOptimizer(table, lr=0.1, weight_decay=0.1)
    before = table.weight.clone()
    for _ in range(3):
        table(torch.zeros(5, dtype=torch.int64)).sum().backward()  # only the null row
        optimizer.step(table.take_touched())
    assert torch.equal(table.weight[1:], before[1:])
    assert not torch.equal(table.weight[0], before[0])
    assert bool((optimizer.state[0][1:] == 0).all())
    optimizer.step([])
    optimizer.forget(torch.tensor([0]))
    assert bool((optimizer.state[0] == 0).all())


def test_the_table_refuses_ids_outside_and_takes_empty_batches():
    table = FusedTable(10, 4)
    for bad in (-1, 10, 1 << 40):
        with pytest.raises(ValueError, match="ids"):
            table(torch.tensor([bad]))
    assert table(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 4)
    with pytest.raises(TypeError, match="ids"):
        table(torch.zeros(2))


def test_evaluation_leaves_no_trace():
    table = FusedTable(10, 4).eval()
    table(torch.tensor([1]))
    assert table.take_touched() == []
    with torch.no_grad():
        table.train()(torch.tensor([1]))
    assert table.take_touched() == []


def test_dense_inputs():
    from lirank.layers.dense import DenseInput
    from lirank.schema.transforms import DenseStatistics

    values = np.random.default_rng(0).gamma(2.0, 3.0, 20_000)
    names = ["zscore", "log1p", "quantile", "none"]
    statistics = [DenseStatistics() for _ in names]
    for name, s in zip(names, statistics, strict=True):
        s.observe(np.log1p(values) if name == "log1p" else values)
    layer = DenseInput(
        names,
        torch.tensor([s.mean for s in statistics], dtype=torch.float64),
        torch.tensor([s.deviation for s in statistics], dtype=torch.float64),
        torch.from_numpy(np.stack([s.knots() for s in statistics])),
        [True, False, False, False],
    )
    x = torch.from_numpy(np.repeat(values[:, None], 4, 1)).float()
    found = layer(x)
    assert found.shape == (20_000, 5)
    assert torch.allclose(found[:, :3].mean(0), torch.zeros(3), atol=0.05)
    assert torch.allclose(found[:, :3].std(0), torch.ones(3), atol=0.1)
    skew = ((found[:, 2] - found[:, 2].mean()) ** 3).mean()
    assert abs(float(skew)) < 0.1
    assert torch.equal(found[:, 3], x[:, 3])
    x[0, 0] = math.nan
    assert layer(x)[0, [0, 4]].tolist() == [0.0, 1.0]
