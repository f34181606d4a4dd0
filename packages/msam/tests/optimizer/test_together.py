"""Several base optimizers over disjoint parameters."""

import copy

import pytest
import torch
from msam import MSAM
from torch import nn
from torch.optim.lr_scheduler import LinearLR


def parts_of(model):
    """Matrices to Muon where this torch has it, else to Adam; the rest to AdamW."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    first = getattr(torch.optim, "Muon", torch.optim.Adam)
    return [first(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


@pytest.fixture
def setting(double, oracle):
    make_model, make_batch = oracle.CASES["mlp"]
    return make_model(), [make_batch() for _ in range(4)]


def test_muon_and_adamw_step_as_they_do_alone(setting, oracle):
    model, batches = setting
    twin = copy.deepcopy(model)
    opt, parts = MSAM(model, parts_of(model), rho=0.3, num_micro_batches=3, mode="ghost"), parts_of(twin)
    schedules = [LinearLR(opt, 0.5, 1.0, 4)] + [LinearLR(part, 0.5, 1.0, 4) for part in parts]
    for batch in batches:
        opt.step(oracle.loss_of(model), batch)
        truth = oracle.brute_force(twin, batch, [4, 4, 4], rho=0.3)
        for p, g in zip(twin.parameters(), truth, strict=True):
            p.grad = g
        for part in parts:
            part.step()
        for schedule in schedules:
            schedule.step()
    assert oracle.relative_error(list(model.parameters()), list(twin.parameters())) < 1e-7  # Muon works in bfloat16


@pytest.mark.parametrize("copied", [False, True])
def test_checkpoints_and_copies_hold_all_of_them(setting, oracle, copied):
    model, batches = setting
    opt = MSAM(model, parts_of(model), rho=0.3, num_micro_batches=3, mode="sequential")
    for batch in batches[:2]:
        opt.step(oracle.loss_of(model), batch)
    if copied:
        twin, other = copy.deepcopy((model, opt))
    else:
        twin = copy.deepcopy(model)
        other = MSAM(twin, parts_of(twin), rho=0.3, num_micro_batches=3, mode="sequential")
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for batch in batches[2:]:
        opt.step(oracle.loss_of(model), batch)
        other.step(oracle.loss_of(twin), batch)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_groups_of_either_may_be_left_unperturbed(setting, oracle):
    model, batches = setting
    parts = parts_of(model)
    parts[1].param_groups[0]["perturb"] = False
    opt = MSAM(model, parts, rho=0.3, num_micro_batches=3)
    assert {id(p) for p in opt.tracked(0.3).parameters} == {id(p) for p in model.parameters() if p.ndim == 2}
    assert opt.check(oracle.loss_of(model), batches[0]).engine_error < 1e-12


def test_what_does_not_fit_is_refused(setting):
    model, _ = setting
    with pytest.raises(ValueError, match="more than one"):
        MSAM(model, [torch.optim.SGD(model.parameters(), lr=0.1)] * 2, num_micro_batches=2)
    with pytest.raises(ValueError, match="needs no closure"):
        MSAM(model, [torch.optim.LBFGS(model.parameters())], num_micro_batches=2)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        MSAM(model, [torch.optim.SGD], num_micro_batches=2)
    opt = MSAM(model, parts_of(model), num_micro_batches=2)
    with pytest.raises(ValueError, match="several optimizers"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
