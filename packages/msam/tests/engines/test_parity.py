"""Every engine gives the gradient of the definition, to rounding in float64."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msam import MSAM, msam_grad
from msam.engines.ghost.directions import FEW, Plan
from msam.engines.ghost.factors import Kept
from msam.engines.ghost.uses.linear import LowRankStep, OwnWeights
from msam.engines.ghost.uses.rules import RULES
from msam.step.batches import cut
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F


@pytest.fixture(params=["as chosen", "small layers too"])
def form(request, monkeypatch):
    """Models as small as these keep their factors, unless small layers obey kappa too: both forms are then met."""
    if request.param == "small layers too":
        monkeypatch.setattr("msam.engines.ghost.directions.FEW", 0)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("mode", ["ghost", "sequential"])
@pytest.mark.parametrize("micro_batches", [1, 3, 4, 5])
def test_whole_models_match_brute_force(double, oracle, case, micro_batches, mode):
    make_model, make_batch = oracle.CASES[case]
    model, batch = make_model(), make_batch()
    sizes = cut(12, micro_batches).sizes
    truth = oracle.brute_force(copy.deepcopy(model), batch, list(sizes), rho=0.3)
    before = [p.clone() for p in model.parameters()]
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=micro_batches, mode=mode)
    opt.backward(oracle.loss_of(model), batch)
    assert opt.record.mode == mode
    assert oracle.relative_error(oracle.gradients(model), truth) < 1e-12
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("few", "forms"), [(FEW, {"factors"}), (0, {"factors", "own weights"})])
def test_small_layers_keep_their_factors(double, oracle, monkeypatch, few, forms):
    """The first layer pays by kappa, the head only because it is small: `form` thus meets both forms."""
    found = set()
    for step, name in ((LowRankStep, "factors"), (OwnWeights, "own weights")):
        forward = step.forward
        monkeypatch.setattr(step, "forward", lambda *a, f=forward, n=name: found.add(n) or f(*a))
    monkeypatch.setattr("msam.engines.ghost.directions.FEW", few)
    model = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))
    batch = (torch.randn(12, 40), torch.randint(3, (12,)))
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=6, mode="ghost")
    opt.backward(oracle.loss_of(model), batch)
    assert found == forms


@pytest.mark.parametrize("ascent", ["full", "chained"])
@pytest.mark.parametrize("frozen", ["none", "norm"])
def test_norms_of_large_micro_batches(double, oracle, monkeypatch, ascent, frozen):
    """One kernel call for each micro-batch, with its own scale and shift, instead of `vmap`'s elementwise ones."""
    called = []
    for name in ("group_norm", "layer_norm"):
        norm = getattr(F, name)
        monkeypatch.setitem(RULES, norm, lambda *a, rule=RULES[norm], n=name, **k: called.append(n) or rule(*a, **k))
    monkeypatch.setattr("msam.engines.ghost.uses.rules.LARGE", 1)
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8), nn.Tanh(), nn.GroupNorm(4, 8, affine=False), nn.Flatten(),
        nn.Linear(32, 16), nn.LayerNorm(16, bias=False), nn.Tanh(), nn.Unflatten(1, (4, 4)), nn.LayerNorm((4, 4)),
        nn.LayerNorm(4, elementwise_affine=False), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    if frozen == "norm":
        model[1].weight.requires_grad_(False)
        model[9].requires_grad_(False)
    batch, found = (torch.randn(12, 3, 6), torch.randint(5, (12,))), []
    for mode in ("ghost", "sequential"):
        twin = copy.deepcopy(model)
        opt = MSAM(twin, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=4, mode=mode, ascent=ascent)
        for _ in range(2):
            opt.step(oracle.loss_of(twin), batch)
        assert opt.record.mode == mode
        found.append([p.grad for p in twin.parameters() if p.grad is not None])
    assert set(called) == {"group_norm", "layer_norm"}
    assert oracle.relative_error(*found) < 1e-12


def test_a_product_written_to_a_given_tensor(double):
    """No rule may drop `out=`; autograd refuses it for what it differentiates, so the weight is data here."""
    weight, buffer = nn.Parameter(torch.randn(20, 5)), torch.empty(3, 5)
    model = nn.ParameterList([weight])
    opt = MSAM(model, torch.optim.SGD, lr=0.0, num_micro_batches=4, mode="ghost")

    def loss_fn(batch):
        with torch.no_grad():
            torch.matmul(batch[0], weight, out=buffer)
        return F.cross_entropy(batch[0] @ weight, batch[1]) + buffer.square().mean()

    batch = (torch.randn(12, 20), torch.randint(5, (12,)))
    with pytest.warns(UserWarning, match="sequential mode instead of ghost"):
        loss = opt.step(loss_fn, batch)
    parts = zip(batch[0].chunk(4), batch[1].chunk(4), strict=True)
    with torch.no_grad():
        truth = torch.stack([F.cross_entropy(x @ weight, y) + (x @ weight).square().mean() for x, y in parts]).mean()
    torch.testing.assert_close(loss, truth)


def test_what_pass_1_collects_has_no_graph(double, oracle, case, monkeypatch):
    """A plan outlives pass 1; graphs would keep all activations alive with it, and pass 2 must not run through them."""
    make_model, make_batch = oracle.CASES[case]
    model, seen, finish = make_model(), [], Plan.finish

    def look(plan, *args, **kwargs):
        seen.extend(plan.gradients.tensors())
        finish(plan, *args, **kwargs)

    monkeypatch.setattr(Plan, "finish", look)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=4, mode="ghost")
    opt.backward(oracle.loss_of(model), make_batch())
    assert seen
    assert not any(t.requires_grad for t in seen)


@pytest.mark.parametrize("size", [1e-140, 1e-60, 1e60])
def test_a_loss_of_any_size_takes_the_same_step(double, oracle, size):
    """A direction does not depend on the gradient's length, however near to zero that is."""
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    truth = oracle.brute_force(copy.deepcopy(model), batch, [4, 4, 4], rho=0.3)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=3, mode="ghost")
    loss_fn = oracle.loss_of(model)
    opt.backward(lambda part: size * loss_fn(part), batch)
    assert oracle.relative_error([g / size for g in oracle.gradients(model)], truth) < 1e-12


@pytest.mark.parametrize("micro_batches", [1, 3, 5])
def test_vmap_matches_brute_force(double, oracle, micro_batches):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    model[1] = nn.ReLU()  # in place is beyond vmap
    truth = oracle.brute_force(model, batch, list(cut(12, micro_batches).sizes), rho=0.3)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=micro_batches, mode="vmap")
    opt.backward(oracle.loss_of(model), batch)
    assert oracle.relative_error(oracle.gradients(model), truth) < 1e-12


@pytest.mark.parametrize("mode", ["sequential", "vmap"])
def test_functional_form(double, oracle, mode):
    model = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 5))
    batch = (torch.randn(12, 20), torch.randint(5, (12,)))
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss_fn(values, part):
        return F.cross_entropy(functional_call(model, values, (part[0],)), part[1])

    grads, aux = msam_grad(loss_fn, params, batch, rho=0.3, num_micro_batches=5, mode=mode, chunk_size=2)
    truth = oracle.brute_force(model, batch, list(cut(12, 5).sizes), rho=0.3)
    assert oracle.relative_error(list(grads.values()), truth) < 1e-12
    assert aux.gradient_norms.shape == (5,)
    assert aux.perturbed_loss > aux.loss


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("mode", ["ghost", "sequential"])
def test_half_ascent(double, oracle, case, mode):
    make_model, make_batch = oracle.CASES[case]
    model, batch = make_model(), make_batch()
    size = 4 if case == "batch norm" else 5  # a batch norm cannot take half of the two examples that 5 would leave
    truth = oracle.brute_force(copy.deepcopy(model), batch, list(cut(12, None, size).sizes), rho=0.3, half=True)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, micro_batch_size=size, mode=mode, ascent="half")
    opt.backward(oracle.loss_of(model), batch)
    assert opt.record.mode == mode
    assert oracle.relative_error(oracle.gradients(model), truth) < 1e-12


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("adaptive", ["filter", "layer"])
def test_adaptive_ghost_equals_sequential(double, oracle, case, adaptive):
    make_model, make_batch = oracle.CASES[case]
    model, batch = make_model(), make_batch()
    found = {}
    for mode in ("sequential", "ghost"):
        twin = copy.deepcopy(model)
        opt = MSAM(twin, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=4, mode=mode, adaptive=adaptive)
        opt.backward(oracle.loss_of(twin), batch)
        assert opt.record.mode == mode
        found[mode] = (oracle.gradients(twin), opt.record.gradient_norms)
    assert oracle.relative_error(found["ghost"][0], found["sequential"][0]) < 1e-12
    torch.testing.assert_close(found["ghost"][1], found["sequential"][1], rtol=1e-10, atol=0)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("ascent", ["full", "norm"])
def test_groups_ghost_equals_sequential(double, oracle, ascent):
    """perturb=False, a radius of a group's own, frozen parameters, norm-layer ascent."""
    make_model, make_batch = oracle.CASES["transformer"]
    model, batch = make_model(), make_batch()
    found = []
    for mode in ("sequential", "ghost"):
        twin = copy.deepcopy(model)
        twin.table.weight.requires_grad_(False)
        groups = [
            {"params": [twin.tokens.weight, *twin.head.parameters()], "perturb": False},
            {"params": [twin.positions, *twin.layer.self_attn.parameters(), twin.layer.norm1.bias], "rho": 0.7},
            {"params": [p for n, p in twin.layer.named_parameters() if "self_attn" not in n and n != "norm1.bias"]},
        ]
        opt = MSAM(twin, torch.optim.SGD, groups, lr=0.1, rho=0.2, num_micro_batches=4, mode=mode, ascent=ascent)
        opt.backward(oracle.loss_of(twin), batch)
        assert opt.record.mode == mode
        found.append(oracle.gradients(twin))
    assert oracle.relative_error(found[1], found[0]) < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    examples=st.integers(1, 17),
    data=st.data(),
    rho=st.sampled_from([0.0, 1e-3, 0.5, 10.0]),
    few=st.sampled_from([0, FEW]),
)
def test_any_perceptron(widths, examples, data, rho, few):
    """Low rank and materialised layers, sizes of one, unequal micro-batches, no and huge radii."""
    micro_batches = data.draw(st.integers(1, examples))
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=a % 2 == 0) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())]).double()
    batch = (torch.randn(examples, widths[0]).double(), torch.randn(examples, widths[-1]).double())
    found = []
    for mode in ("sequential", "ghost"):
        twin = copy.deepcopy(model)
        opt = MSAM(twin, torch.optim.SGD, lr=0.1, rho=rho, num_micro_batches=micro_batches, mode=mode)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("msam.engines.ghost.directions.FEW", few)
            opt.backward(lambda part, twin=twin: F.mse_loss(twin(part[0]), part[1]), batch)
        assert opt.record.mode == mode
        found.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
    assert (found[0] - found[1]).norm() <= 1e-11 * found[0].norm() + 1e-300


def test_batch_norm_without_parameters_on_the_raw_input(double, oracle):
    """It mixes examples, so it needs a rule, and has no gradient to read off."""
    model = nn.Sequential(nn.BatchNorm1d(20, affine=False), nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    batch = (torch.randn(12, 20), torch.randint(5, (12,)))
    truth = oracle.brute_force(copy.deepcopy(model), batch, [3] * 4, rho=0.3)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=4, mode="ghost")
    opt.backward(oracle.loss_of(model), batch)
    assert opt.record.mode == "ghost"
    assert oracle.relative_error(oracle.gradients(model), truth) < 1e-12


@pytest.mark.usefixtures("form")
def test_recurrent_weights_are_shared_over_steps(double, oracle):
    """The same linear layer at several times: cross terms of the norm count."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.Linear(40, 40), nn.Linear(40, 5)

        def forward(self, x):
            h = x[:, 0]
            for t in range(1, x.shape[1]):
                h = torch.tanh(self.cell(h) + x[:, t])
            return self.head(h)

    model, batch = Recurrent(), (torch.randn(12, 4, 40), torch.randint(5, (12,)))
    for micro_batches in (1, 6):
        model.zero_grad()
        truth = oracle.brute_force(model, batch, list(cut(12, micro_batches).sizes), rho=0.3)
        opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=micro_batches, mode="ghost")
        opt.backward(oracle.loss_of(model), batch)
        assert opt.record.mode == "ghost"
        assert oracle.relative_error(oracle.gradients(model), truth) < 1e-12


@pytest.fixture
def taken(monkeypatch):
    """Whether each product that pass 1 kept was taken over."""
    answers, serves = [], Kept.serves
    monkeypatch.setattr(Kept, "serves", lambda self, x: answers.append(serves(self, x)) or answers[-1])
    return answers


@pytest.mark.parametrize("change", ["nothing", "result"])
def test_the_first_product_is_taken_over_only_while_it_is_intact(double, oracle, taken, change):
    """Pass 2 takes pass 1's first product over, unless it was overwritten in the meantime."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(20, 64), nn.Linear(64, 5)

        def forward(self, x):
            h = self.first(x)
            h = h.relu_() if change == "result" else h.relu()
            return self.last(h)

    model, batch = First(), (torch.randn(12, 20), torch.randint(5, (12,)))
    truth = oracle.brute_force(model, batch, [3] * 4, rho=0.3)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=4, mode="ghost")
    opt.backward(oracle.loss_of(model), batch)
    assert taken == [change == "nothing"]
    assert oracle.relative_error(oracle.gradients(model), truth) < 1e-12


@pytest.mark.parametrize("length", [3, 12])
def test_the_first_product_of_sequences_that_come_first(double, oracle, taken, length):
    """It is taken over in the order of the examples, also where as many steps as examples hide a wrong one."""

    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(20, 64), nn.Linear(64, 5)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x.transpose(0, 1)))).logsumexp(0)

    model, batch = SequenceFirst(), (torch.randn(12, length, 20), torch.randint(5, (12,)))
    truth = oracle.brute_force(model, batch, [2] * 6, rho=0.3)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=6, mode="ghost")
    opt.backward(oracle.loss_of(model), batch)
    assert opt.record.mode == "ghost"
    assert taken == [True]
    assert oracle.relative_error(oracle.gradients(model), truth) < 1e-12


def test_float32_is_close(oracle):
    make_model, make_batch = oracle.CASES["mlp"]
    torch.manual_seed(0)
    model, batch = make_model(), make_batch()
    truth = oracle.brute_force(copy.deepcopy(model), batch, [2] * 6, rho=0.3)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=6, mode="ghost")
    opt.backward(oracle.loss_of(model), batch)
    assert oracle.relative_error(oracle.gradients(model), truth) < 1e-5
