"""Chained ascent: one pass whose directions are the last step's gradients, the same in both engines."""

import copy
import io

import pytest
import torch
from msam import MSAM
from torch import nn


def optimizer_of(model, mode, **options):
    settings = {"lr": 0.05, "momentum": 0.9, "rho": 0.3, "num_micro_batches": 3, "ascent": "chained"}
    return MSAM(model, torch.optim.SGD, mode=mode, **(settings | options))


def both(oracle, model, batches, modes=("ghost", "sequential"), **options):
    """Train a copy of the model in either mode, or from one mode to the other in the middle."""
    found = []
    for mode in modes:
        twin = copy.deepcopy(model)
        opt, told = optimizer_of(twin, mode, **options), []
        for batch in batches:
            opt.step(oracle.loss_of(twin), batch)
            assert opt.record.mode in {mode, "plain"}
            told.append((oracle.gradients(twin), opt.record.gradient_norms))
        found.append(told)
    for (ours, norms), (truth, true_norms) in zip(*found, strict=True):
        assert oracle.relative_error(ours, truth) < 1e-10
        torch.testing.assert_close(norms, true_norms, rtol=1e-8, atol=1e-12)


def test_the_engines_agree(double, oracle, case):
    """Over batches of several sizes: micro-batches keep their slots, and slots that a small batch lacks wait."""
    make_model, make_batch = oracle.CASES[case]
    both(oracle, make_model(), [tuple(t[:n] for t in make_batch()) for n in (12, 10, 12, 7, 12)])


@pytest.mark.parametrize(
    "options",
    [{"adaptive": "filter"}, {"adaptive": "layer"}, {"every": 2}, {"num_micro_batches": 1}, {"clip_norm": 0.1},
     {"num_micro_batches": None, "micro_batch_size": 5}, {"rho": lambda step: 0.1 * step},
     {"shard_weight": lambda part: float(part[1][0] + 1)}],
    ids=["filter", "layer", "every", "alone", "clipped", "by size", "schedule", "weighted"],
)  # fmt: skip
def test_with_other_options(double, oracle, options):
    make_model, make_batch = oracle.CASES["mlp"]
    both(oracle, make_model(), [make_batch() for _ in range(4)], **options)


def test_a_direction_is_that_of_the_step_before(double, oracle):
    """By the definition: w + rho g / ||g|| with each slot's gradient of the last step, at the last step's point."""
    make_model, make_batch = oracle.CASES["mlp"]
    model, batches = make_model(), [make_batch() for _ in range(3)]
    opt, last = optimizer_of(model, "ghost", lr=0.0), [None] * 3
    for batch in batches:
        total = [torch.zeros_like(p) for p in model.parameters()]
        for j in range(3):
            part, twin = tuple(t[4 * j : 4 * j + 4] for t in batch), copy.deepcopy(model)
            with torch.no_grad():
                if last[j] is not None:
                    norm = torch.sqrt(sum(g.square().sum() for g in last[j]))
                    for p, g in zip(twin.parameters(), last[j], strict=True):
                        p.add_(0.3 * g / norm)
            last[j] = torch.autograd.grad(oracle.loss_of(twin)(part), list(twin.parameters()))
            total = [t + g / 3 for t, g in zip(total, last[j], strict=True)]
        opt.step(oracle.loss_of(model), batch)
        assert oracle.relative_error(oracle.gradients(model), total) < 1e-12


@pytest.mark.parametrize("first", ["ghost", "sequential"])
def test_checkpoints_go_from_one_engine_to_the_other(double, oracle, first):
    make_model, make_batch = oracle.CASES["tied transformer"]
    model, batches = make_model(), [make_batch() for _ in range(4)]
    twin = copy.deepcopy(model)
    truth, opt = optimizer_of(twin, first), optimizer_of(model, first)
    for batch in batches[:2]:
        opt.step(oracle.loss_of(model), batch)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = optimizer_of(model, "sequential" if first == "ghost" else "ghost")
    other.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[2:]:
        other.step(oracle.loss_of(model), batch)
    for batch in batches:
        truth.step(oracle.loss_of(twin), batch)
    assert oracle.relative_error(list(model.parameters()), list(twin.parameters())) < 1e-10


@pytest.mark.parametrize("mode", ["ghost", "sequential"])
def test_after_a_skipped_step_a_slot_does_not_move(double, oracle, mode):
    make_model, make_batch = oracle.CASES["mlp"]
    model, scaler = make_model(), torch.amp.GradScaler("cpu", init_scale=16.0)
    opt = optimizer_of(model, mode, lr=0.0)
    for step in range(3):
        x, y = make_batch()
        x[5] = float("inf") if step == 1 else x[5]
        opt.step(oracle.loss_of(model), (x, y), scaler=scaler)
        scaler.update()
    moved = (opt.record.gradient_norms > 0).tolist()
    assert moved == [True, False, True]
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_data_that_is_overwritten_between_steps_was_copied(double, oracle):
    """A loader that reuses its buffers."""
    make_model, make_batch = oracle.CASES["mlp"]
    model, batches = make_model(), [make_batch() for _ in range(3)]
    twin = copy.deepcopy(model)
    opt, other, buffer = optimizer_of(model, "ghost"), optimizer_of(twin, "ghost"), make_batch()
    for batch in batches:
        opt.step(oracle.loss_of(model), batch)
        for place, value in zip(buffer, batch, strict=True):
            place.copy_(value)
        other.step(oracle.loss_of(twin), buffer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_activations_that_are_overwritten_between_steps_are_noticed(double, oracle):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch, seen = make_model(), make_batch(), []
    model[1].register_forward_hook(lambda module, inputs, result: seen.append(result.detach()))
    opt = optimizer_of(model, "ghost")
    opt.step(oracle.loss_of(model), batch)
    torch._C._functorch.get_unwrapped(seen[0]).zero_()
    with pytest.raises(ValueError, match="overwritten"):
        opt.step(oracle.loss_of(model), batch)


@pytest.mark.parametrize("mode", ["ghost", "sequential"])
def test_other_parameters_begin_another_chain(double, oracle, mode):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch, norms = make_model(), make_batch(), []
    opt = optimizer_of(model, mode, lr=0.0)
    for thawed in (False, False, True, True):
        model[0].weight.requires_grad_(thawed)
        opt.step(oracle.loss_of(model), batch)
        norms.append(bool((opt.record.gradient_norms > 0).all()))
    assert norms == [False, True, False, True]


class Hidden(torch.autograd.Function):
    """Takes its weight out of sight of torch functions."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


def test_a_parameter_that_goes_out_of_sight_later_is_noticed(double, oracle):
    """In a single pass the parameters are in the graph, which has to show each use."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.hidden = nn.Linear(20, 16), nn.Linear(16, 5), False

        def forward(self, x):
            x = Hidden.apply(x, self.first.weight) if self.hidden else self.first(x)
            return self.last(torch.tanh(x))

    model, make_batch = Late(), oracle.CASES["mlp"][1]
    twin, batches = copy.deepcopy(model), [make_batch() for _ in range(3)]
    opt, truth = optimizer_of(model, "ghost"), optimizer_of(twin, "sequential")
    opt.step(oracle.loss_of(model), batches[0])
    model.hidden = True
    with pytest.warns(UserWarning, match="sequential mode instead of ghost"):
        opt.step(oracle.loss_of(model), batches[1])
    opt.step(oracle.loss_of(model), batches[2])
    for step, batch in enumerate(batches):
        twin.hidden = step > 0
        truth.step(oracle.loss_of(twin), batch)
    assert oracle.relative_error(list(model.parameters()), list(twin.parameters())) < 1e-10
