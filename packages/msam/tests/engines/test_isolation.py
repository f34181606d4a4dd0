"""Coupling, gates, ramps, hooks, buffers and other optimizers' parameters: exact, or a warning and exact."""

import copy
import random

import numpy as np
import pytest
import torch
from msam import MSAM, micro_batches
from msam.step.passes import NumpyState
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MODES = pytest.mark.parametrize("mode", ["ghost", "sequential"])


def batch_of(examples=12):
    return torch.randn(examples, 20), torch.randint(5, (examples,))


def both(model, loss, batches, **options):
    """The gradient of the last step in ghost mode, and of plain mSAM on a copy of the model."""
    found = []
    for mode in ("ghost", "sequential"):
        twin = copy.deepcopy(model)
        opt = MSAM(twin, torch.optim.SGD, lr=0.0, rho=0.3, num_micro_batches=3, mode=mode, **options)
        for step, batch in enumerate(batches):
            opt.zero_grad()
            opt.backward(lambda part, twin=twin, step=step: loss(twin, part, step), batch)
        found.append(torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]))
    return found


def logits(model, hidden):
    return model[2](torch.tanh(hidden))


LOSSES = {
    "batch mean": lambda m, b, s: F.cross_entropy(logits(m, (h := m[0](b[0])) - 0.3 * h.mean(0)), b[1]),
    "a gate that never fired": lambda m, b, s: F.cross_entropy(
        logits(m, torch.where(torch.tensor(s == 3), (h := m[0](b[0])).flip(0), h)), b[1]
    ),
    "contrastive ramp": lambda m, b, s: (
        F.cross_entropy(m(b[0]), b[1]) + 0.2 * s * F.cross_entropy((h := m[0](b[0])) @ h.T, torch.arange(len(h)))
    ),
    "a scale of the batch": lambda m, b, s: F.cross_entropy(
        logits(m, (h := m[0](b[0])) / (h.norm() if s == 3 else 1.0)), b[1]
    ),
    "a branch on the data": lambda m, b, s: F.cross_entropy(
        logits(m, m[0](b[0]) * (2.0 if b[0].sum() > 0 else 1.0)), b[1]
    ),
    "penalty": lambda m, b, s: F.cross_entropy(m(b[0]), b[1]) + 0.1 * m[0].weight.square().sum(),
    "einsum": lambda m, b, s: F.cross_entropy(logits(m, torch.einsum("ni,oi->no", b[0], m[0].weight)), b[1]),
}


@pytest.mark.filterwarnings("ignore:msam. sequential mode instead")
@pytest.mark.parametrize("kind", LOSSES)
def test_hidden_coupling_is_exact(double, oracle, kind):
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5))
    ghost, plain = both(model, LOSSES[kind], [batch_of() for _ in range(4)])
    assert float((ghost - plain).norm()) <= 1e-12 * float(plain.norm())


def test_random_gates_between_examples_stay_inside_their_micro_batch(double):
    """No example of another micro-batch has any influence, whatever the gates draw."""
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5))

    def loss_fn(part):
        h = model[0](part[0])
        return F.cross_entropy(logits(model, torch.where(torch.rand(len(h), 1) < 0.3, h.flip(0), h)), part[1])

    x, y = batch_of()
    changed, found = x.clone(), []
    changed[4:] = 7.0  # the other two micro-batches
    for inputs in (x, changed):
        torch.manual_seed(0)
        opt = MSAM(model, torch.optim.SGD, lr=0.0, rho=0.3, num_micro_batches=3, mode="ghost")
        opt.backward(loss_fn, (inputs, y))
        assert opt.record.mode == "ghost"
        found.append(opt.record.gradient_norms[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("way", ["ghost", "sequential", "hand", "closure"])
def test_parameters_of_another_optimizer_get_the_gradient_at_the_perturbed_weights(double, oracle, way, inside):
    encoder, head, batch = nn.Linear(20, 16), nn.Linear(16, 5), batch_of()
    model = nn.Sequential(encoder, nn.Tanh(), head)
    count = 1 if way == "closure" else 3
    truth = []
    for part in micro_batches(batch, count):  # by hand, from the definition
        twin = copy.deepcopy(model)
        g = torch.autograd.grad(oracle.loss_of(twin)(part), list(twin[0].parameters()))
        norm = torch.cat([x.flatten() for x in g]).norm()
        with torch.no_grad():
            for p, x in zip(twin[0].parameters(), g, strict=True):
                p.add_(x, alpha=float(0.3 / norm))
        truth.append(torch.autograd.grad(oracle.loss_of(twin)(part), list(twin[2].parameters())))
    mean = [sum(g) / count for g in zip(*truth, strict=True)]
    mode = way if way in {"ghost", "sequential"} else "sequential"
    opt = MSAM(
        model if inside else encoder, torch.optim.SGD, encoder.parameters(), lr=0.0, rho=0.3, num_micro_batches=count,
        mode=mode,
    )  # fmt: skip
    other, loss_fn = torch.optim.SGD(head.parameters(), lr=0.0), oracle.loss_of(model)
    for _ in range(2):
        other.zero_grad()
        if way == "hand":
            opt.zero_grad()
            for part in micro_batches(batch, count):
                with opt.ascent():
                    loss_fn(part).backward()
                with opt.descent():
                    loss_fn(part).backward()
            opt.step()
        elif way == "closure":

            def closure():
                opt.zero_grad()
                other.zero_grad()
                loss = loss_fn(batch)
                loss.backward()
                return loss

            opt.step(closure)
        else:
            opt.step(loss_fn, batch)
        other.step()
        assert oracle.relative_error([p.grad for p in head.parameters()], mean) < 1e-12


class Stateful(nn.Module):
    """Writes a running mean, a counter and a codebook by hand."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 5)
        self.register_buffer("mean", torch.zeros(20))
        self.register_buffer("codes", torch.ones(3, 20))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.mean(0).detach())
        self.codes.data.add_(0.1 * x[:3].detach())
        return self.layer(x - self.mean)


@pytest.mark.filterwarnings("ignore:msam. sequential mode instead")
@pytest.mark.parametrize("mode", ["ghost", "sequential", "auto", "hand"])
def test_state_after_a_step_is_that_of_one_plain_pass(double, oracle, mode):
    model, batch = Stateful(), batch_of()
    plain = copy.deepcopy(model)
    opt = MSAM(
        model, torch.optim.SGD, lr=0.0, num_micro_batches=3, mode="sequential" if mode == "hand" else mode
    )  # fmt: skip
    for _ in range(2):
        for part in micro_batches(batch, 3):
            oracle.loss_of(plain)(part)
        if mode == "hand":
            for part in micro_batches(batch, 3):
                with opt.ascent():
                    oracle.loss_of(model)(part).backward()
                with opt.descent():
                    oracle.loss_of(model)(part).backward()
            opt.step()
        else:
            opt.step(oracle.loss_of(model), batch)
        assert torch.equal(model.mean, plain.mean)
        assert torch.equal(model.codes, plain.codes)
        assert model.calls == plain.calls


@MODES
def test_sums_over_examples(double, oracle, mode):
    model, batch = oracle.CASES["mlp"][0](), oracle.CASES["mlp"][1]()
    found = []
    for reduction in ("mean", "sum"):
        model.zero_grad()
        opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=4, mode=mode, reduction=reduction)
        opt.backward(lambda part, r=reduction: F.cross_entropy(model(part[0]), part[1], reduction=r), batch)
        found.append(oracle.gradients(model))
    assert oracle.relative_error([12 * g for g in found[0]], found[1]) < 1e-12


def test_generators_of_python_and_numpy_are_rewound(seeded):
    model, drawn = nn.Linear(4, 2), []

    def loss_fn(part):
        drawn.append((random.random(), float(np.random.rand())))  # noqa: NPY002
        return model(part).square().mean()

    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=2, mode="sequential")
    opt.step(loss_fn, torch.randn(4, 4))
    assert drawn[0] == drawn[1]
    assert drawn[2] == drawn[3]
    assert drawn[0] != drawn[2]


def test_reentrant_checkpointing_with_a_group_that_is_not_perturbed(double, oracle):
    model, batch = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)), batch_of()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "perturb": False}]
    found = []
    for again in (False, True):
        model.zero_grad()

        def loss_fn(part, again=again):
            x = part[0].detach().requires_grad_()
            hidden = checkpoint(model[0], x, use_reentrant=True) if again else model[0](x)
            return F.cross_entropy(logits(model, hidden), part[1])

        opt = MSAM(model, torch.optim.SGD, groups, lr=0.1, rho=0.3, num_micro_batches=3, mode="sequential")
        opt.backward(loss_fn, batch)
        found.append(oracle.gradients(model))
    assert oracle.relative_error(*found) < 1e-12


@pytest.mark.parametrize("before", [0, 1, 700], ids=["fresh", "one waits", "next block"])
@pytest.mark.parametrize("draw", ["standard_normal", "random", "permutation", None])
def test_numpys_state_is_that_of_its_own_functions(before, draw):
    """Also where a second normal number waits that no word of the generator shows, and after a state set by hand."""
    np.random.seed(3)  # noqa: NPY002 (the global generator is the one that losses draw from)
    np.random.standard_normal(before)  # noqa: NPY002
    for _ in range(2):
        want, state = np.random.get_state(), NumpyState()  # noqa: NPY002
        if draw is not None:
            getattr(np.random, draw)(5)
        state.rewind()
        got = np.random.get_state()  # noqa: NPY002
        assert (got[0], *got[2:]) == (want[0], *want[2:])
        np.testing.assert_array_equal(got[1], want[1])
        np.random.standard_normal(1)  # noqa: NPY002


def test_another_generator_of_numpy():
    own = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(5))
        state, first = NumpyState(), np.random.random()  # noqa: NPY002
        state.rewind()
        assert np.random.random() == first  # noqa: NPY002
    finally:
        np.random.set_bit_generator(own)
