"""The rate that follows the curvature, and the advice of a pilot run."""

import dataclasses
import itertools
import math

import pytest
import torch
from sgd_stability import StabilityMonitor, StabilityScheduler, advise, analyze
from sgd_stability.cli import OPTIMIZERS
from sgd_stability.monitor import advice
from torch import nn
from torch.nn import functional as F


def _problem(seed=0, n=256, scale=1.0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(n, 6)
    return model, x * scale, (x @ torch.randn(6, 3)).argmax(1)


def _run(model, x, y, optimizer, scheduler, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        which = torch.randint(len(x), (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[which]), y[which]).backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def _scheduled(build, steps=300, **options):
    model, x, y = _problem(scale=options.pop("scale", 1.0))
    optimizer = build(model.parameters())
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=16, on_unstable=None)
    scheduler = StabilityScheduler(optimizer, monitor, total_steps=steps, **options)
    return model, x, y, optimizer, scheduler


@pytest.mark.parametrize("name", advice.OPTIMIZERS)
def test_the_rate_ramps_up_settles_below_lower_and_falls_to_zero(name):
    model, x, y, optimizer, scheduler = _scheduled(advice.OPTIMIZERS[name])
    assert _run(model, x, y, optimizer, scheduler, 300) < 0.5 * scheduler.monitor.start_loss
    rates = scheduler.rates
    assert len(rates) == 300
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert rates[-1] < 0.02 * max(rates)
    jumps = [b / a for a, b in itertools.pairwise(rates) if a > 0]
    assert max(jumps) <= 1.5 ** (1 / 7) * (1 + 1e-9)  # a check every 30 steps, and four times as often on the way up
    settled = [c for c in scheduler.monitor.history if 150 < c.step < 210]
    assert all(c.lr < 2 * c.lower for c in settled)
    assert len(scheduler.monitor.history) < 20


def test_inputs_four_times_as_large_get_a_smaller_rate():
    rates = []
    for scale in (1.0, 4.0):
        model, x, y, optimizer, scheduler = _scheduled(lambda p: torch.optim.SGD(p, lr=1.0), scale=scale)
        _run(model, x, y, optimizer, scheduler, 150)
        rates.append(scheduler.rate)
    assert rates[1] < rates[0] / 2


def test_a_loss_that_rises_holds_the_rate_or_halves_it_whatever_the_curvature_says():
    *_, scheduler = _scheduled(lambda p: torch.optim.SGD(p, lr=1.0))
    check = scheduler.monitor.history[-1]

    def goal(loss, average):
        scheduler._rate = rate = scheduler._goal or 1.0
        flat = dataclasses.replace(check, state="stable", loss=loss, average_loss=average, lower=100 * check.lower)
        scheduler._follow(flat)
        return scheduler._goal / rate

    assert goal(0.5, 0.5) > 1
    assert goal(0.6, 0.55) == 1  # a little higher: the flatter curvature is not followed
    assert goal(0.7, 0.62) == 0.5
    assert goal(0.7, 0.66) == 1  # halved once for one rise
    assert goal(0.5, 0.58) > 1


def test_groups_keep_their_proportions():
    model, x, y = _problem()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[2].parameters(), "lr": 0.1}]
    )
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=16)
    scheduler = StabilityScheduler(optimizer, monitor, total_steps=60)
    _run(model, x, y, optimizer, scheduler, 30)
    first, second = scheduler.get_last_lr()
    assert second == pytest.approx(0.1 * first)


def test_a_resumed_run_goes_on_at_the_same_rates(tmp_path):
    def run(resume):
        model, x, y, optimizer, scheduler = _scheduled(lambda p: torch.optim.AdamW(p, lr=1.0), steps=80)
        _run(model, x, y, optimizer, scheduler, 40)
        if resume:
            path = tmp_path / "state.pt"
            torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], path)
            weights, state, schedule = torch.load(path, weights_only=True)
            model, x, y, optimizer, scheduler = _scheduled(lambda p: torch.optim.AdamW(p, lr=1.0), steps=80)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            scheduler.load_state_dict(schedule)
        _run(model, x, y, optimizer, scheduler, 40, seed=1)
        return scheduler.rates

    assert run(False) == pytest.approx(run(True), rel=1e-12)


def test_nan_does_not_end_the_run_and_the_rate_falls():
    model, x, y, optimizer, scheduler = _scheduled(lambda p: torch.optim.SGD(p, lr=1.0))
    _run(model, x, y, optimizer, scheduler, 60)
    rate = scheduler.rate
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model[2].bias[0] = math.nan
    _run(model, x, y, optimizer, scheduler, 30)
    assert scheduler.rate < rate / 3
    model.load_state_dict(weights)
    _run(model, x, y, optimizer, scheduler, 30)
    assert scheduler.rate > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"growth": 1.0}, "growth: "),
        ({"share": 0.0}, "share: "),
        ({"decay": 1.5}, "decay: "),
        ({"every": 0}, "every: "),
        ({"steps": 0}, "total_steps: "),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        _scheduled(lambda p: torch.optim.SGD(p, lr=1.0), **options)
    model, x, y = _problem()
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=16)
    with pytest.raises(ValueError, match=r"optimizer: .*positive"):
        StabilityScheduler(torch.optim.SGD(model.parameters(), lr=0.0), monitor, total_steps=10)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_advice_trains_well_and_leaves_the_model_alone(optimizer):
    model, x, y = _problem(n=512)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = advise(model, "cross_entropy", (x, y), optimizer=optimizer, batch_size=16, steps=150)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.low <= found.lr * 2
    assert 0 <= found.warmup < 150
    assert 1 <= found.largest_batch_size <= 512
    assert set(found.culprits) <= set(range(512))
    assert "learning rate" in str(found)

    def trained(lr):
        model.load_state_dict(before)
        engine = advice.OPTIMIZERS[optimizer](model.parameters())
        engine.param_groups[0]["lr"] = lr
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            which = torch.randint(len(x), (16,), generator=generator)
            engine.zero_grad()
            F.cross_entropy(model(x[which]), y[which]).backward()
            engine.step()
        with torch.no_grad():
            return float(F.cross_entropy(model(x), y))

    assert trained(found.lr) < trained(found.lr / 30)


def test_outliers_are_named_as_what_caps_the_rate():
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    x[7] *= 30
    model, y = nn.Linear(6, 2), torch.randn(200, 2)
    found = advise(model, "mse", (x, y), optimizer="sgd", batch_size=16, steps=60, probe_batch=200)
    assert next(iter(found.culprits)) == 7
    exact = analyze(model, "mse", (x, y)).lr_threshold(16).exact
    assert exact / 10 < found.lr < exact


def test_names_of_the_command_line_are_those_of_the_library():
    assert tuple(advice.OPTIMIZERS) == OPTIMIZERS
    model, x, y = _problem()
    with pytest.raises(ValueError, match="optimizer: expected one of sgd, momentum"):
        advise(model, "cross_entropy", (x, y), optimizer="lion")


def test_checks_wait_until_the_rate_has_grown_and_then_follow_the_ramp():
    model, x, y, optimizer, scheduler = _scheduled(lambda p: torch.optim.SGD(p, lr=1.0), every=8)
    _run(model, x, y, optimizer, scheduler, 9)
    assert [check.step for check in scheduler.monitor.history] == [0, 6, 8]  # a quarter of `every` is 2


def test_a_lower_bound_that_falls_during_the_ramp_counts_at_once():
    _, _, _, _, scheduler = _scheduled(lambda p: torch.optim.SGD(p, lr=1.0))
    first = scheduler.monitor.history[0]
    scheduler._follow(dataclasses.replace(first, lower=first.lower / 5))
    assert scheduler._goal == pytest.approx(scheduler.share * first.lower / 5)


def test_a_scheduled_optimizer_has_hooks_only_for_tier_1():
    model, x, y = _problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    StabilityScheduler(optimizer, StabilityMonitor(model, "cross_entropy", (x, y), batch_size=16), total_steps=40)
    assert not optimizer._optimizer_step_post_hooks
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=16, every_cheap=3)
    scheduler = StabilityScheduler(optimizer, monitor, total_steps=40)
    _run(model, x, y, optimizer, scheduler, 7)
    assert [entry[0] for entry in monitor.sharpness_history] == [3, 6]
