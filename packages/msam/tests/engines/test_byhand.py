"""The two passes by hand and with a standard closure: as exact, careful and talkative as `step(loss_fn, batch)`."""

import copy
import math

import pytest
import torch
from msam import MSAM, micro_batches


@pytest.fixture
def setting(double, oracle):
    make_model, make_batch = oracle.CASES["mlp"]
    return make_model(), make_batch()


def by_hand(opt, loss_fn, parts):
    opt.zero_grad()
    for part in parts:
        if opt.perturbs:
            with opt.ascent():
                loss_fn(part).backward()
        with opt.descent(weight=len(part[0])):
            loss_fn(part).backward()
    opt.step()


def closure_of(opt, loss_fn, batch):
    def closure():
        opt.zero_grad()
        loss = loss_fn(batch)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("way", ["hand", "closure"])
@pytest.mark.parametrize("options", [{}, {"every": 2}, {"adaptive": True}, {"rho": lambda step: 0.2 / (1 + step)}])
def test_every_way_takes_the_same_steps(setting, oracle, way, options):
    model, batch = setting
    twin, count = copy.deepcopy(model), 1 if way == "closure" else 4
    options = {"rho": 0.5, "num_micro_batches": count} | options
    opt = MSAM(model, torch.optim.SGD, lr=0.1, mode="sequential", **options)
    other = MSAM(twin, torch.optim.SGD, lr=0.1, **options)
    for _ in range(3):
        opt.step(oracle.loss_of(model), batch)
        if way == "closure":
            other.step(closure_of(other, oracle.loss_of(twin), batch))
        else:
            by_hand(other, oracle.loss_of(twin), micro_batches(batch, count))
        assert oracle.relative_error(list(twin.parameters()), list(model.parameters())) < 1e-13
        one, two = opt.record.as_dict(), other.record.as_dict()
        assert two["mode"] == ("plain" if one["mode"] == "plain" else "by hand")
        for key in ("rho", "gradient_norm", "perturbation_norm", "micro_batches"):
            assert two[key] == pytest.approx(one[key], rel=1e-10), key
        for key in ("loss", "perturbed_loss"):
            assert two[key] == (None if way == "hand" else pytest.approx(one[key], rel=1e-10)), key


@pytest.mark.parametrize("ascent", ["half", "chained"])
def test_an_ascent_that_needs_the_batch_is_refused(setting, oracle, ascent):
    model, batch = setting
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=1, ascent=ascent)
    with pytest.raises(ValueError, match=rf"ascent: '{ascent}' .*use step\(loss_fn, batch\)"), opt.ascent():
        oracle.loss_of(model)(batch).backward()
    with pytest.raises(ValueError, match=rf"ascent: '{ascent}' .*use step\(loss_fn, batch\)"):
        opt.step(closure_of(opt, oracle.loss_of(model), batch))


def test_plain_steps_cost_one_pass_and_a_loop_must_ask(setting, oracle):
    model, batch = setting
    opt, calls = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=3, every=3), []
    for _ in range(6):
        by_hand(opt, lambda part: calls.append(1) or oracle.loss_of(model)(part), micro_batches(batch, 3))
    assert len(calls) == 2 * 6 + 4 * 3
    by_hand(opt, oracle.loss_of(model), [batch])
    assert not opt.perturbs
    with pytest.raises(ValueError, match=r"ascent: every=3 makes this a plain step.*only if `perturbs`"), opt.ascent():
        pass


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("where", ["ascent", "descent"])
def test_a_gradient_that_is_not_finite_is_never_trained_in(setting, oracle, value, where):
    model, batch = setting
    before = [p.clone() for p in model.parameters()]
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=2)
    for j, part in enumerate(micro_batches(batch, 2)):
        with opt.ascent():
            (oracle.loss_of(model)(part) * (value if (where, j) == ("ascent", 0) else 1.0)).backward()
        with opt.descent():
            (oracle.loss_of(model)(part) * (value if (where, j) == ("descent", 0) else 1.0)).backward()
    assert opt.record.skipped == (where == "ascent")
    torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)  # hides an infinite gradient
    if where == "ascent" or math.isnan(value):
        with pytest.raises(ValueError, match="loss: expected finite gradients, got norms"):
            opt.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    model.zero_grad()  # not opt.zero_grad(): the next mean begins anyway
    by_hand(opt, oracle.loss_of(model), micro_batches(batch, 2))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_grad_scaler_skips_an_infinite_ascent(seeded, oracle):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    before = [p.clone() for p in model.parameters()]
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for infinite in (True, False):
        opt.zero_grad()
        for part in micro_batches(batch, 2):
            with opt.ascent():
                scaler.scale(oracle.loss_of(model)(part) * (math.inf if infinite else 1.0)).backward()
            with opt.descent():
                scaler.scale(oracle.loss_of(model)(part)).backward()
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == 2.0**9
        assert opt.record.skipped == infinite
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) == infinite
