"""What ghost mode may meet in a model: uses without a rule, several paths, hooks, parameters that thaw."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from msam import MSAM
from msam.engines.ghost.uses.linear import LowRankStep
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
        elif self.kind == "leaf":
            x = self.first(x.requires_grad_())
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


@pytest.mark.parametrize("kind", ["function", "mixing", "data"])
def test_what_no_rule_covers_runs_on_replicas(double, oracle, kind):
    model, batch = Odd(kind), (torch.randn(12, 20), torch.randint(5, (12,)))
    found = []
    for mode in ("sequential", "ghost"):
        model.zero_grad()
        opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=3, mode=mode)
        opt.backward(oracle.loss_of(model), batch)
        assert opt.record.mode == mode
        found.append(oracle.gradients(model))
    assert oracle.relative_error(*found) < 1e-12


@pytest.mark.parametrize(
    ("kind", "cause"),
    [("checkpointing", "activation checkpoint"), ("leaf", "calls `requires_grad_`"), ("hidden", "autograd.Function")],
)
def test_what_ghost_cannot_follow_falls_back_once_to_the_same_numbers(double, oracle, kind, cause):
    model, batch = Odd(kind), (torch.randn(12, 20), torch.randint(5, (12,)))
    twin = copy.deepcopy(model)
    MSAM(twin, torch.optim.SGD, lr=0.1, num_micro_batches=3, mode="sequential").step(oracle.loss_of(twin), batch)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=3)
    with pytest.warns(UserWarning, match=f"sequential mode instead of ghost: .*{cause}"):
        opt.step(oracle.loss_of(model), batch)
    assert opt.record.mode == "sequential"
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(oracle.loss_of(model), batch)


def test_paths_through_a_model(double, oracle):
    """Layer drop."""

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


@pytest.mark.parametrize("ascent", ["full", "chained"])
def test_complex_parameters_run_sequentially(double, oracle, ascent):
    weight, (x, y), found = torch.randn(20, 5, dtype=torch.complex128), (torch.randn(12, 20), torch.arange(12) % 5), []
    for mode in ("sequential", "ghost"):
        module = nn.ParameterDict({"w": weight.clone()})
        opt = MSAM(module, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=3, mode=mode, ascent=ascent)

        def loss_fn(part, module=module):
            return F.cross_entropy((part[0].to(torch.complex128) @ module["w"]).abs(), part[1])

        with nullcontext() if mode == "sequential" else pytest.warns(UserWarning, match="parameter w is complex"):
            for _ in range(2):
                opt.step(loss_fn, (x, y))
        found.append(module["w"].detach())
    assert torch.equal(*found)
    assert not torch.allclose(found[0], weight)


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


@pytest.mark.parametrize("fault", ["forward", "backward"])
def test_the_check_finds_rows_in_a_wrong_order(double, oracle, monkeypatch, fault):
    right = getattr(LowRankStep, fault)

    def wrong(*args):
        result = right(*args)
        return args[-1].copy_(args[-1].flip(0)) if result is None else result.flip(0)  # forward writes to the last one

    monkeypatch.setattr(LowRankStep, fault, wrong)
    model, batch = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5)), oracle.CASES["mlp"][1]()
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=4, mode="ghost")
    with pytest.raises(RuntimeError, match="gradient of the ghost engine is off by"):
        opt.check(oracle.loss_of(model), batch)


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
    kept = [tuple(map(torch._C._functorch.get_unwrapped, pair)) for pair in kept]  # all micro-batches' at once
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


@pytest.mark.parametrize("what", ["wrapped", "in place", "loss"])
def test_compiled_models_run_uncompiled(double, oracle, what):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    truth = oracle.brute_force(copy.deepcopy(model), batch, [3] * 4, rho=0.3)
    called, loss_fn = model, oracle.loss_of(model)
    if what == "wrapped":
        called = torch.compile(model, backend="eager")
        loss_fn = oracle.loss_of(called)
    elif what == "in place":
        model.compile(backend="eager")
    else:
        loss_fn = torch.compile(loss_fn, backend="eager")
    opt = MSAM(called, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=4, mode="ghost")
    assert opt.model is model  # behind the wrapper, where DDP and FSDP2 are found as well
    with pytest.warns(UserWarning, match="uncompiled"):
        opt.backward(loss_fn, batch)
    for _ in range(2):
        assert opt.record.mode == "ghost"
        assert oracle.relative_error(oracle.gradients(model), truth) < 1e-12
        opt.zero_grad()
        opt.backward(loss_fn, batch)
    loss_fn(batch)  # and outside of mSAM it is compiled as before


class ZeroHead(nn.Module):
    """Nothing below a head that starts at zero gets a gradient in the first step."""

    def __init__(self, length, hidden=False):
        super().__init__()
        self.tokens, self.table = nn.Embedding(20, 16), nn.Embedding(length, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        self.head = nn.Linear(16, 5)
        self.hidden = nn.Linear(16, 16, bias=False) if hidden else None
        nn.init.zeros_(self.head.weight)

    def forward(self, ids):
        x = (self.tokens(ids) + self.table(torch.arange(ids.shape[1]))).transpose(0, 1)  # (T, B, d)
        x = self.layer(x).mean(0)
        if self.hidden is not None:
            with torch._C.DisableTorchFunction():  # as a kernel of another library, which no torch function shows
                x = Hidden.apply(x, self.hidden.weight)
        return self.head(x)


@pytest.mark.parametrize("length", [7, 12, 24])
def test_layers_without_a_gradient_at_first(double, oracle, length):
    """As many positions as examples, sequence first: only a gradient or a result tells which dimension is which."""
    model = ZeroHead(length)
    batch = (torch.randint(20, (12, length)), torch.randint(5, (12,)))
    opt = MSAM(model, torch.optim.SGD, lr=0.5, rho=0.3, num_micro_batches=4, mode="ghost")
    for _ in range(3):
        opt.zero_grad()
        truth = oracle.brute_force(copy.deepcopy(model), batch, [3] * 4, rho=0.3)
        opt.step(oracle.loss_of(model), batch)
        assert opt.record.mode == "ghost"
        assert oracle.relative_error(oracle.gradients(model), truth) < 1e-12


def test_a_hidden_use_below_a_zero_head_is_found_at_once(double, oracle):
    model, batch = ZeroHead(7, hidden=True), (torch.randint(20, (12, 7)), torch.randint(5, (12,)))
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=4)
    with pytest.warns(UserWarning, match="sequential mode instead of ghost"):
        opt.step(oracle.loss_of(model), batch)


@pytest.mark.parametrize("weights", [False, True])
def test_targets_that_are_masked_only_later(double, oracle, weights):
    """Micro-batches weigh as in sequential mode, and a warning says so where nobody has chosen their weights."""
    ids, targets = torch.randint(20, (12, 6)), torch.randint(20, (12, 6))
    masked = torch.where(torch.arange(72).view(12, 6) % 5 == 1, targets, -100)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Tanh(), nn.Linear(16, 20), nn.Flatten(0, 1))
    count = (lambda part: float((part[1] != -100).sum())) if weights else None
    opts = {
        mode: MSAM(
            model, torch.optim.SGD, lr=0.0, rho=0.3, num_micro_batches=4, mode=mode, shard_weight=count
        )
        for mode in ("ghost", "sequential")
    }  # fmt: skip
    found = []
    for mode, opt in opts.items():
        opt.step(oracle.loss_of(model), (ids, targets))
        expected = nullcontext() if weights or mode == "sequential" else pytest.warns(UserWarning, match="shard_weight")
        with expected:
            opt.step(oracle.loss_of(model), (ids, masked))
        found.append(oracle.gradients(model))
    assert opts["ghost"].record.mode == "ghost"
    assert oracle.relative_error(*found) < 1e-12


def test_a_scalar_parameter(double, oracle):
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.temperature = nn.Linear(20, 5), nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            return self.layer(x) * self.temperature

    model, batch = Tempered(), (torch.randn(12, 20), torch.randint(5, (12,)))
    truth = oracle.brute_force(model, batch, [3] * 4, rho=0.3)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=4, mode="ghost")
    opt.backward(oracle.loss_of(model), batch)
    assert oracle.relative_error(oracle.gradients(model), truth) < 1e-12


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_statistics_move_once_on_a_new_path(double, oracle, micro_batches):
    """Also below the first trained layer, where a pass that stops at a new path has been already."""
    found = []
    for mode in ("sequential", "ghost"):
        torch.manual_seed(0)
        model = oracle.batch_norms()
        for p in (*model[0].parameters(), *model[1].parameters()):
            p.requires_grad_(False)
        opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=micro_batches, mode=mode)
        opt.step(oracle.loss_of(model), oracle.images())
        model[6].requires_grad_(False)  # a new path: the same calls with other owners
        opt.step(oracle.loss_of(model), oracle.images())
        assert opt.record.mode == mode
        found.append(list(model.buffers()))
    for ghost, sequential in zip(*found, strict=True):
        torch.testing.assert_close(ghost, sequential, rtol=1e-12, atol=1e-12)


def test_layers_that_take_turns_without_a_gradient(double, oracle):

    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(20, 5), nn.Linear(20, 5)
            self.gates = torch.tensor([1.0, 0.0])

        def forward(self, x):
            return self.gates[0] * self.left(x) + self.gates[1] * self.right(x)

    model, batch = Turns(), (torch.randn(12, 20), torch.randint(5, (12,)))
    opt = MSAM(model, torch.optim.SGD, lr=0.0, rho=0.3, num_micro_batches=4, mode="ghost")
    for step in range(6):
        model.gates = torch.tensor([1.0, 0.0]).roll(step)
        opt.step(oracle.loss_of(model), batch)
        truth = oracle.brute_force(model, batch, [3] * 4, rho=0.3)
        assert oracle.relative_error(oracle.gradients(model), truth) < 1e-12
