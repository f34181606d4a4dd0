"""Bad input is refused with the argument's name, what was expected, and what came."""

import math

import pytest
import torch
from click.testing import CliRunner
from msam import MSAM, auto_rho, micro_batches, msam_grad
from msam.cli import main
from msam.step.batches import batch_size, cut
from msam.study.data import load
from torch import nn


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


BATCH = (torch.ones(4, 3), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of the two, got None and None"),
        ({"num_micro_batches": 2, "micro_batch_size": 2}, "exactly one of the two, got 2 and 2"),
        ({"num_micro_batches": 0}, "num_micro_batches"),
        ({"num_micro_batches": 2, "rho": -0.1}, "rho: expected a value in .* got -0.1"),
        ({"num_micro_batches": 2, "rho": math.nan}, "rho: .* got nan"),
        ({"num_micro_batches": 2, "rho": math.inf}, "rho: .* got inf"),
        ({"num_micro_batches": 2, "mode": "magic"}, "mode: .* got 'magic'"),
        ({"num_micro_batches": 2, "ascent": "up"}, "ascent"),
        ({"num_micro_batches": 2, "adaptive": "row"}, "adaptive"),
        ({"num_micro_batches": 2, "every": 0}, "every"),
        ({"num_micro_batches": 2, "bn": "second"}, "bn"),
        ({"num_micro_batches": 2, "rng": "other"}, "rng"),
        ({"num_micro_batches": 2, "clip_norm": 0.0}, "clip_norm"),
        ({"num_micro_batches": 2, "mode": "ghost", "adaptive": True}, "mode: 'ghost' cannot"),
        ({"num_micro_batches": 2, "mode": "vmap", "ascent": "half"}, "mode: 'vmap' goes with"),
        ({"num_micro_batches": 2, "ascent": "norm"}, "normalization layers, got none"),
        ({"num_micro_batches": 2, "params": []}, "params: expected at least one"),
    ],
)
def test_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        MSAM(model, torch.optim.SGD, lr=0.1, **options)


def test_types(model):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        MSAM([], torch.optim.SGD, lr=0.1, num_micro_batches=2)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer"):
        MSAM(model, lambda groups: groups, num_micro_batches=2)
    with pytest.raises(TypeError, match="shard_weight"):
        MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=2, shard_weight=3)
    with pytest.raises(ValueError, match="an instance brings its own"):
        MSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), lr=0.1, num_micro_batches=2)
    with pytest.raises(TypeError, match="perturb"):
        MSAM(model, torch.optim.SGD, [{"params": model.parameters(), "perturb": 1}], lr=0.1, num_micro_batches=2)


def test_a_base_optimizer_that_needs_a_closure(model):
    for made in (torch.optim.LBFGS, torch.optim.LBFGS(model.parameters())):
        with pytest.raises(ValueError, match=r"optimizer: expected one whose step\(\) needs no closure, .* got LBFGS"):
            MSAM(model, made, num_micro_batches=2)
    for base in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adafactor):
        MSAM(model, base, lr=0.1, num_micro_batches=2)


@pytest.mark.parametrize("mode", ["auto", "sequential", "vmap"])
def test_nothing_to_perturb(model, mode):
    opt = MSAM(
        model, torch.optim.SGD, [{"params": model.parameters(), "perturb": False}], lr=0.1, num_micro_batches=2,
        mode=mode,
    )  # fmt: skip
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        with pytest.raises(ValueError, match="params: expected a trainable parameter in a group with perturb=True"):
            opt.step(lambda part: model(part[0]).square().mean(), BATCH)
    with pytest.raises(ValueError, match="params: expected a trainable parameter"), opt.ascent():
        pass


LOSSES = {
    "none": (lambda model, part: None, TypeError, "scalar tensor, got NoneType"),
    "vector": (lambda model, part: model(part[0]).sum(0), ValueError, r"a scalar, got shape \(2,\)"),
    "nan": (lambda model, part: model(part[0]).mean() * math.nan, ValueError, "a finite value, got nan"),
    "detached": (lambda model, part: model(part[0]).sum().detach(), ValueError, "with a graph"),
    "unrelated": (lambda model, part: torch.ones((), requires_grad=True) * 1, ValueError, "expected gradients"),
}


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, kind) for mode in ("auto", "sequential") for kind in LOSSES]
    + [("vmap", kind) for kind in ("none", "vector", "nan")],  # functional gradients of a constant are zero, no error
)
def test_losses(model, mode, kind):
    loss_fn, error, message = LOSSES[kind]
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=2, mode=mode)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(error, match=message):
        opt.step(lambda part: loss_fn(model, part), BATCH)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_steps_out_of_order(model):
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=2)
    with pytest.raises(ValueError, match="closure: expected step"):
        opt.step()
    with pytest.raises(ValueError, match="cannot be cut into micro-batches"):
        opt.step(lambda: model(BATCH[0]).sum())
    with pytest.raises(ValueError, match=r"expected an ascent\(\) block"), opt.descent():
        pass
    with pytest.raises(ValueError, match="expected gradients"), opt.ascent():
        pass
    sam = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=1)
    with pytest.raises(ValueError, match="expected gradients"):
        sam.step(lambda: model(BATCH[0]).sum())
    with pytest.raises(ValueError, match="return the loss, got None"):
        sam.step(lambda: model(BATCH[0]).sum().backward())


def test_an_error_in_the_second_pass_restores_the_weights(model):
    calls = []

    def loss_fn(part):
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("out of data")
        return model(part[0]).square().mean()

    before = [p.clone() for p in model.parameters()]
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=2, mode="sequential")
    with pytest.raises(KeyError):
        opt.step(loss_fn, BATCH)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_batches(model):
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=5)
    opt.step(lambda part: model(part[0]).mean(), BATCH)  # as the last batch of an epoch, smaller than m
    assert opt.record.as_dict()["micro_batches"] == len(BATCH[0]) == 4
    assert len(list(micro_batches(BATCH, micro_batch_size=5))) == 1
    with pytest.raises(ValueError, match="common first dimension"):
        batch_size((torch.ones(3), torch.ones(4)))
    with pytest.raises(ValueError, match="common first dimension"):
        batch_size({"x": torch.ones(0, 3)})
    assert cut(10, 4).sizes == (3, 3, 2, 2)
    assert cut(10, None, 4).sizes == (4, 4, 2)
    assert [len(part["x"]) for part in micro_batches({"x": torch.ones(7), "n": 3}, 2)] == [4, 3]


def test_a_schedule_that_leaves_the_range(model):
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=2, rho=lambda step: -1.0)
    with pytest.raises(ValueError, match=r"rho: .* got -1.0 at step 0"):
        opt.step(lambda part: model(part[0]).sum(), BATCH)


def test_auto_rho(model):
    assert auto_rho(16) == pytest.approx(0.05 / 4)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=4, rho="auto")
    opt.step(lambda part: model(part[0]).square().mean(), BATCH)
    assert opt.record.rho == pytest.approx(0.025)


def test_shard_weights(model):
    for weight in (lambda part: 0.0, lambda part: -1.0, lambda part: math.nan):
        opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=2, shard_weight=weight, mode="sequential")
        with pytest.raises(ValueError, match="shard_weight"):
            opt.step(lambda part: model(part[0]).sum(), BATCH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": {}}, "params: expected at least one parameter, got none"),
        ({"chunk_size": -3, "mode": "vmap"}, "chunk_size: .* got -3"),
        ({"chunk_size": 0, "mode": "vmap"}, "chunk_size: .* got 0"),
        ({"rng": "other"}, "rng: .* got 'other'"),
        ({"rho": -1.0}, "rho: .* got -1"),
        ({"factor": math.nan}, "loss: expected a finite value, got nan"),
        ({"root": True}, r"loss: expected a finite gradient, got norms \[inf, inf\]"),
    ],
)
def test_the_functional_form(options, message):
    options = {"params": {"w": torch.zeros(3, 2)}, "num_micro_batches": 2, "factor": 1.0, "root": False} | options
    params, factor, root = options.pop("params"), options.pop("factor"), options.pop("root")

    def loss_fn(w, part):
        y = part[0] @ w["w"]
        return factor * (y.sum().sqrt() if root else y.square().mean())

    with pytest.raises(ValueError, match=message):
        msam_grad(loss_fn, params, BATCH, **options)
    if factor != 1.0:
        assert math.isnan(msam_grad(loss_fn, params, BATCH, num_micro_batches=2, check_finite=False)[1].loss)


def test_commands_refuse_with_one_line_and_code_2():
    for arguments, message in (
        (["compare", "--methods", "sgd,adam"], "methods: expected"),
        (["compare", "--data", "cifar"], "--folder"),
        (["compare", "--rho", "-1", "--epochs", "1", "--seeds", "1"], "rho: expected"),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert "Traceback" not in result.output
    with pytest.raises(ValueError, match="data"):
        load("imagenet")
