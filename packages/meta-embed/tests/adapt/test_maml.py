import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_embed.adapt.maml import InnerOptions, adapt, inner_loop
from meta_embed.model.meta_model import MetaModel
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

F64 = torch.float64


class Dot(nn.Module):
    """g: a perceptron on [vector, row]."""

    def __init__(self, d, p):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d + p, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, e, x):
        return self.net(torch.cat([e, x], -1))[..., 0]


def _model(order=2, what="all", rates="tensor", steps=3, chunk=512, seed=0):
    torch.manual_seed(seed)
    meta = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
    options = InnerOptions(steps=steps, lr=0.3, order=order, adapt=what, rates=rates, chunk=chunk)
    return MetaModel(meta, Dot(3, 4), options).double()


def _tasks(lengths, seed=1):
    g = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    member = (torch.randn(len(lengths), 2, generator=g, dtype=F64),)
    x = (torch.randn(rows, 4, generator=g, dtype=F64),)
    y = (torch.rand(rows, generator=g) < 0.5).double()
    w = torch.rand(rows, generator=g, dtype=F64) + 0.2
    return member, x, y, w, torch.tensor(lengths)


def _plain_loop(model, member, rows, y, w, lengths):
    """One task after the other with torch.autograd, without padding: shares nothing with vmap."""
    inner, found = model.inner, []
    starts = [0, *lengths.cumsum(0).tolist()]
    rates = model.rates()
    for t in range(len(lengths)):
        part = slice(starts[t], starts[t + 1])
        m, x = member[0][t : t + 1], rows[0][part]
        if inner.adapt == "embedding":
            names, values = ["embedding"], [model.meta_block(m)[0]]
        else:
            own = dict(model.meta_block.named_parameters())
            names = model.rates.names
            values = [own[n] for n in names]

        def vector(values, m=m, names=names):
            if names == ["embedding"]:
                return values[0]
            return torch.func.functional_call(model.meta_block, dict(zip(names, values, strict=True)), (m,))[0]

        for _ in range(inner.steps if len(x) else 0):
            logits = model.global_block(vector(values).expand(len(x), -1), x)
            loss = (w[part] * binary_cross_entropy_with_logits(logits, y[part], reduction="none")).sum() / w[part].sum()
            gradients = torch.autograd.grad(loss, values, create_graph=inner.order == 2)
            values = [v - rates[n] * g for n, v, g in zip(names, values, gradients, strict=True)]
        found.append(vector(values))
    return torch.stack(found)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=7), st.sampled_from([1, 2]),
    st.sampled_from(["all", "last", "embedding"]), st.sampled_from(["fixed", "scalar", "tensor"]), st.integers(1, 4),
)  # fmt: skip
def test_vmap_equals_a_loop_in_values_and_gradients(lengths, order, what, rates, chunk):
    model, tasks = _model(order, what, rates, chunk=chunk), _tasks(lengths)
    e, expected = model.adapt(*tasks), _plain_loop(model, *tasks)
    assert float((e - expected).detach().abs().max()) <= 1e-12
    weight = torch.randn(e.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    parameters = list(model.parameters())
    ours = torch.autograd.grad((e * weight).sum(), parameters, allow_unused=True)
    loop = torch.autograd.grad((expected * weight).sum(), parameters, allow_unused=True)
    for one, other in zip(ours, loop, strict=True):
        one, other = (torch.zeros(1, dtype=F64) if g is None else g for g in (one, other))
        assert float((one - other).abs().max()) <= 1e-10


def test_second_order_reaches_the_global_block_through_the_steps():
    tasks = _tasks([4, 5])
    gradients = []
    for order in (1, 2):
        model = _model(order)
        e = model.adapt(*tasks)
        gradients.append(torch.autograd.grad(e.sum(), list(model.global_block.parameters()), allow_unused=True))
    assert all(g is None or float(g.abs().max()) == 0.0 for g in gradients[0])  # first order: constants
    assert any(g is not None and float(g.abs().max()) > 0 for g in gradients[1])


def test_an_empty_support_keeps_the_unadapted_vector():
    model = _model()
    member, rows, y, w, lengths = _tasks([0, 3, 0])
    e = model.adapt(member, rows, y, w, lengths)
    plain = model.meta_block(*member)
    torch.testing.assert_close(e[[0, 2]], plain[[0, 2]], rtol=1e-12, atol=0)  # vmap multiplies in another order
    assert not torch.equal(e[1], plain[1])
    nobody = model.adapt(member, (rows[0][:0],), y[:0], w[:0], torch.zeros(3, dtype=torch.int64))
    assert torch.equal(nobody, plain)


def test_a_task_does_not_depend_on_padding_or_its_neighbors():
    model = _model()
    member, rows, y, w, lengths = _tasks([2, 7, 4])
    e = model.adapt(member, rows, y, w, lengths)
    for t, (first, n) in enumerate(((0, 2), (2, 7), (9, 4))):
        part = slice(first, first + n)
        alone = model.adapt((member[0][t : t + 1],), (rows[0][part],), y[part], w[part], lengths[t : t + 1])
        assert torch.allclose(alone[0], e[t], rtol=0, atol=1e-13)


def test_a_parameter_that_no_task_uses_keeps_its_value():
    """learn2learn #284, #314: such a parameter ends their loop with an error, or silently ends its gradient."""
    parameters = {"used": torch.ones(2, dtype=F64), "idle": torch.full((3,), 7.0, dtype=F64)}
    rates = {name: torch.tensor(0.1, dtype=F64) for name in parameters}

    def loss(p, x):
        return ((p["used"] * x).sum() - 1.0) ** 2

    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    out = adapt(loss, parameters, rates, (x,), InnerOptions(steps=2))
    assert torch.equal(out["idle"], parameters["idle"].expand(5, 3))
    single = inner_loop(loss, parameters, rates, 2, 2, x[3])
    assert torch.allclose(out["used"][3], single["used"], rtol=0, atol=1e-15)


def test_batch_norm_in_training_mode_is_refused():
    """functorch #384: its running statistics would be those of one task, or an error inside vmap."""
    meta = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model = MetaModel(meta, Dot(3, 4)).double()
    with pytest.raises(ValueError, match="batch norm would mix a task's rows"):
        model.adapt(*_tasks([2, 3]))
    before = {n: b.clone() for n, b in model.named_buffers()}
    assert torch.isfinite(model.eval().adapt(*_tasks([2, 3]))).all()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


class Block(nn.Module):
    """g over sequences of any layer that reads them."""

    def __init__(self, layer, width=4):
        super().__init__()
        self.layer, self.into, self.out = layer, nn.Linear(3, width), nn.Linear(width, 1)

    def forward(self, e, x):
        read = self.layer(torch.cat([self.into(e)[:, None], x], 1))
        return self.out(read[:, 0])[..., 0]


@pytest.mark.parametrize("training", [True, False])
def test_attention_has_its_second_order(training):
    """The fused kernel that torch picks on its own has neither a second derivative nor a batching rule."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = MetaModel(nn.Linear(2, 3), Block(layer), InnerOptions(steps=2)).double().train(training)
    member, _, y, w, lengths = _tasks([3, 0, 2])
    x = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(5), dtype=F64)
    weight = model.meta_block.weight

    def value(change):
        with torch.no_grad():
            weight.add_(change)
            out = float(model.adapt(member, (x,), y, w, lengths).square().sum())
            weight.sub_(change)
        return out

    (found,) = torch.autograd.grad(model.adapt(member, (x,), y, w, lengths).square().sum(), [weight])
    step = torch.zeros_like(weight)
    step[1, 0] = 1e-5
    assert float(found[1, 0]) == pytest.approx((value(step) - value(-step)) / 2e-5, rel=1e-6)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.EmbeddingBag(5, 4), "cannot follow EmbeddingBag"),
        (nn.Embedding(5, 4, max_norm=1.0), "max_norm changes the table"),
        (nn.GRU(4, 4), "cannot follow recurrent layers"),
    ],
)
def test_layers_that_cannot_be_followed_are_refused_with_a_way_out(layer, message):
    """torch.func ends with `Autograd not support dtype: Long` or a broadcast error deep inside."""
    with pytest.raises(ValueError, match=f"global_block.layer: .*{message}"):
        MetaModel(nn.Linear(2, 3), Block(layer)).adapt(*_tasks([2]))


class Column(nn.Linear):
    """Logits of the shape that a last linear layer gives."""

    def __init__(self):
        super().__init__(7, 1)

    def forward(self, e, x):
        return super().forward(torch.cat([e, x], -1))


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected one logit per row, shape \(2,\), got \(2, 1\)"):
        MetaModel(nn.Linear(2, 3), Column()).double().adapt(*_tasks([2]))


def test_bad_options():
    with pytest.raises(ValueError, match="inner: expected steps"):
        InnerOptions(lr=0.0)
    with pytest.raises(ValueError, match="expected a module with parameters"):
        MetaModel(nn.Identity(), Dot(3, 4))
    with pytest.raises(ValueError, match="expected tensors of one leading size"):
        adapt(
            lambda p, a, b: p["x"].sum(),
            {"x": torch.ones(1)},
            {"x": torch.ones(())},
            (torch.ones(2), torch.ones(3)),
            InnerOptions(),
        )
