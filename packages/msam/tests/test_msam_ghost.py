"""What ghost mode may meet in a model: uses without a rule, several paths, hooks, parameters that thaw."""

import copy
import warnings

import pytest
import torch
from msam import MSAM
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Odd(nn.Module):
    """Uses a parameter in a way that no rule covers."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(20, 16), nn.Linear(16, 5), kind

    def forward(self, x):
        if self.kind == "function":
            x = F.linear(x, torch.tanh(self.first.weight), self.first.bias)
        elif self.kind == "mixing":
            x = self.first(x - x.mean(0))
        elif self.kind == "checkpointing":
            x = checkpoint(self.first, x, use_reentrant=False)
        elif self.kind == "hidden":
            x = Hidden.apply(x, self.first.weight)
        elif self.kind == "data":
            x = x @ self.first.weight.T
        return self.last(torch.tanh(x))


class Hidden(torch.autograd.Function):
    """A fused kernel that takes its weight out of sight of torch functions."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t())

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


@pytest.mark.parametrize("kind", ["function", "mixing", "checkpointing", "hidden", "data"])
def test_what_ghost_cannot_follow_falls_back_once_to_the_same_numbers(double, oracle, kind):
    model, batch = Odd(kind), (torch.randn(12, 20), torch.randint(5, (12,)))
    twin = copy.deepcopy(model)
    MSAM(twin, torch.optim.SGD, lr=0.1, num_micro_batches=3, mode="sequential").step(oracle.loss_of(twin), batch)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=3)
    with pytest.warns(UserWarning, match="sequential mode instead of ghost"):
        opt.step(oracle.loss_of(model), batch)
    assert opt.record.mode == "sequential"
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(oracle.loss_of(model), batch)


def test_paths_through_a_model_are_proved_one_by_one(double, oracle):
    """Layer drop: two paths, each proved when it first comes up."""

    class Drop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.use = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 5), True

        def forward(self, x):
            x = torch.tanh(self.a(x))
            return self.c(torch.tanh(self.b(x)) if self.use else x)

    model, batch = Drop(), (torch.randn(12, 20), torch.randint(5, (12,)))
    opt = MSAM(model, torch.optim.SGD, lr=0.0, rho=0.3, num_micro_batches=4, mode="ghost")
    for use in (True, False, True):
        model.use = use
        opt.step(oracle.loss_of(model), batch)
        assert opt.record.mode == "ghost"
        used = list(model.parameters()) if use else [*model.a.parameters(), *model.c.parameters()]
        reference = MSAM(model, torch.optim.SGD, used, lr=0.0, rho=0.3, num_micro_batches=4, mode="sequential")
        got = [p.grad.clone() for p in used]
        reference.step(oracle.loss_of(model), batch)
        assert oracle.relative_error(got, [p.grad for p in used]) < 1e-12


@pytest.mark.parametrize("mode", ["ghost", "sequential"])
def test_freezing_and_unfreezing_between_steps(double, oracle, mode):
    """A parameter that starts to train later is perturbed from then on, and one that stops is left alone."""
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    model[0].weight.requires_grad_(False)
    opt = MSAM(model, torch.optim.SGD, lr=0.0, rho=0.3, num_micro_batches=4, mode=mode)
    opt.step(oracle.loss_of(model), batch)
    model[0].weight.requires_grad_(True)
    opt.step(oracle.loss_of(model), batch)
    truth = oracle.brute_force(model, batch, [3] * 4, rho=0.3)
    assert opt.record.mode == mode
    assert oracle.relative_error(oracle.gradients(model), truth) < 1e-12


def test_activations_that_a_hook_kept_are_not_overwritten(double, oracle):
    """Pass 2 takes over the first product of pass 1, which a logger may still hold."""
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch, kept = make_model(), make_batch(), []
    model[1] = nn.ReLU()
    opt = MSAM(model, torch.optim.SGD, lr=0.0, rho=0.3, num_micro_batches=4, mode="ghost")
    opt.step(oracle.loss_of(model), batch)
    model[0].register_forward_hook(lambda module, inputs, result: kept.append((result, result.detach().clone())))
    opt.step(oracle.loss_of(model), batch)
    assert len(kept) == 2
    assert all(torch.equal(now, then) for now, then in kept)
    assert not torch.equal(kept[0][0], kept[1][0])


def test_parameters_are_never_written(double, oracle, case):
    """Version counters see every write in place, also one that is undone, in the proof as in the steps after it."""
    make_model, make_batch = oracle.CASES[case]
    model, batch = make_model(), make_batch()
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=3, mode="ghost")
    before = [(p.data_ptr(), p._version, p.detach().clone()) for p in model.parameters()]
    for _ in range(2):
        opt.backward(oracle.loss_of(model), batch)
    assert opt.record.mode == "ghost"
    for p, (place, version, value) in zip(model.parameters(), before, strict=True):
        assert (p.data_ptr(), p._version) == (place, version)
        assert torch.equal(p, value)
    MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=3, mode="sequential").backward(oracle.loss_of(model), batch)
    assert next(model.parameters())._version > before[0][1]  # the counter does see the other engine's writes
