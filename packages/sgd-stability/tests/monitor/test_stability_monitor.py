import json
import math
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from sgd_stability import InstabilityWarning, StabilityMonitor, Update, analyze
from sgd_stability.monitor.callbacks import metrics
from sgd_stability.monitor.monitor import MonitorWarning
from sgd_stability.report.check import Band, LossRecord, state_of
from sgd_stability.report.optimizers import read_optimizer
from torch import nn
from torch.nn import functional as F


def _problem(n=48, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(n, 4)
    return model, x, (x @ torch.randn(4, 3)).argmax(1)


def _train(model, x, y, optimizer, steps, batch=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        which = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[which]), y[which]).backward()
        optimizer.step()


def test_band_encloses_the_exact_threshold():
    model, x, y = _problem()
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=10, suspects=96, products=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    monitor.attach(optimizer)
    _train(model, x, y, optimizer, 60)
    assert [c.step for c in monitor.history] == [10, 20, 30, 40, 50, 60]
    check = monitor.check()
    exact = analyze(model, "cross_entropy", (x, y), update=Update(momentum=0.9))
    assert check.lambda1 <= exact.lambda_max * (1 + 1e-4)
    assert check.lambda1 == pytest.approx(exact.lambda_max, rel=0.05)
    assert check.max_sample_curvature == pytest.approx(exact.max_sample_curvature, rel=1e-4)
    assert check.culprits[0] == exact.culprits(1)[0].id
    star = exact.lr_threshold(8).exact
    assert 0.9 * check.lower < star <= check.upper * (1 + 1e-3)
    assert "eta* in [" in str(check)
    report = monitor.exact()
    assert report.update == Update(momentum=0.9)
    assert torch.allclose(report.family.h, exact.family.h)  # so the thresholds are the same too


def test_one_product_a_check_follows_the_sharpness_from_below():
    model, x, y = _problem()
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    monitor.attach(optimizer)
    for _ in range(6):
        _train(model, x, y, optimizer, 10)
        exact = analyze(model, "cross_entropy", (x, y)).lambda_max
        assert 0.7 * exact < monitor.history[-1].lambda1 <= 1.1 * exact  # half of it is one check old


def test_warns_reduces_or_calls_back_when_unstable():
    for reaction in ("warn", "reduce_lr", None):
        model, x, y = _problem()
        optimizer = torch.optim.SGD(model.parameters(), lr=50.0)
        monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=4, on_unstable=reaction)
        monitor.attach(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check = monitor.check()
        assert check.state == "unstable"
        assert check.upper < 50
        assert (len([w for w in caught if w.category is InstabilityWarning]) == 1) == (reaction == "warn")
        lr = optimizer.param_groups[0]["lr"]
        assert lr == (pytest.approx(0.9 * check.lower) if reaction == "reduce_lr" else 50.0)
    seen = []
    monitor.on_unstable = lambda m, c: seen.append((m, c))
    check = monitor.check()
    assert seen == [(monitor, check)]


def test_stable_rates_are_recognised_and_batch_sizes_suggested():
    model, x, y = _problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=4, on_unstable=None).attach(optimizer)
    check = monitor.check()
    assert check.state == "stable"
    assert check.safe_batch_size == 1
    assert check.edge == pytest.approx(2e4)


def test_state_resumes_to_the_same_checks():
    def run(resume):
        model, x, y = _problem()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=5, every_cheap=3)
        monitor.attach(optimizer)
        _train(model, x, y, optimizer, 13)
        if resume:
            state = torch.load(resume, weights_only=True) if resume.exists() else None
            if state is None:
                torch.save(monitor.state_dict(), resume)
                state = torch.load(resume, weights_only=True)
            monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=5, every_cheap=3)
            monitor.load_state_dict(state)
            monitor.attach(optimizer)
        _train(model, x, y, optimizer, 12, seed=1)
        return monitor

    with tempfile.TemporaryDirectory() as folder:
        straight, resumed = run(None), run(Path(folder) / "monitor.pt")
    assert len(straight.history) == 5
    for a, b in zip(straight.history, resumed.history, strict=True):
        assert (a.step, a.lambda1, a.upper, a.culprits) == (b.step, b.lambda1, b.upper, b.culprits)
    assert straight.sharpness_history == resumed.sharpness_history
    json.dumps(straight.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="state: "):
        StabilityMonitor(nn.Linear(4, 3), "cross_entropy", _problem()[1:], batch_size=2).load_state_dict(
            straight.state_dict()
        )


def test_batch_sharpness_against_the_dense_hessian(oracle):
    model, x, y = oracle.tiny_network(n=6)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=6)
    H = oracle.dense_sample_hessians(model, lambda: F.cross_entropy(model(x), y)[None])[0]
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))])
    assert monitor.batch_sharpness() == pytest.approx(float(g @ H @ g / (g @ g)), rel=1e-9)


def test_overhead_budget_puts_checks_off():
    model, x, y = _problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=1, max_overhead=1e-9)
    monitor.attach(optimizer)
    _train(model, x, y, optimizer, 5)
    assert len(monitor.history) == 1
    monitor.detach()
    _train(model, x, y, optimizer, 2)
    assert monitor.steps == 5


def test_modes_and_random_state_of_the_training_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()
    x, y = torch.randn(20, 4), torch.randint(0, 3, (20,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=4).attach(optimizer)
    before, statistics = torch.get_rng_state(), model[1].running_mean.clone()
    monitor.check()
    monitor.batch_sharpness()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(statistics, model[1].running_mean)
    assert [m.training for m in model] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_adam_is_read_with_its_preconditioner_and_its_edge_is_real():
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    h = torch.tensor([1.0, 100.0], dtype=torch.float64)
    optimizer = torch.optim.AdamW([w], lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        w.grad = h * w.detach()
        optimizer.step()
    state = read_optimizer(optimizer, {"w": w})
    assert state.update == Update(momentum=0.9, dampening=0.9, decoupled=True)
    group = optimizer.state[w]
    P = (group["exp_avg_sq"] / (1 - 0.999**20)).sqrt() + 1e-8
    assert torch.allclose(state.preconditioner, P)
    edge = state.update.edge(float((h / P).max()))
    assert edge == pytest.approx(38 / float((h / P).max()))
    sizes = []
    for factor in (0.95, 1.05):  # the preconditioned heavy ball of a frozen Adam
        d, m = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for _ in range(2000):
            m = 0.9 * m + 0.1 * h * d
            d = d - factor * edge * m / P
        sizes.append(float(d.norm()))
    assert sizes[0] < 1e-3
    assert not sizes[1] < 1e3


def test_groups_of_different_rates_enter_the_preconditioner():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.05}], momentum=0.5)
    state = read_optimizer(optimizer, {"a": a, "b": b})
    assert state.lr == 0.1
    assert torch.equal(state.preconditioner, torch.tensor([1.0, 1, 2, 2, 2]))


def test_adam_monitor_and_exact_report_agree():
    model, x, y = _problem()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=20, suspects=96)
    monitor.attach(optimizer)
    _train(model, x, y, optimizer, 40)
    check, report = monitor.check(), monitor.exact()
    assert report.method == "jacobian"
    assert report.lr_threshold(8).exact <= check.upper * (1 + 1e-2)
    assert check.culprits[0] == report.culprits(1)[0].id


def test_metrics_are_finite():
    model, x, y = _problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8).attach(optimizer)
    assert all(math.isfinite(v) for v in metrics(monitor.check()).values())


def test_undecided_checks_are_settled_by_the_full_analysis():
    model, x, y = _problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    monitor = StabilityMonitor(
        model, "cross_entropy", (x, y), batch_size=2, on_unstable=None, settle=True, directions=1
    )
    monitor.attach(optimizer)
    band = monitor.check()
    exact = analyze(model, "cross_entropy", (x, y)).lr_threshold(2).exact
    for factor, state in ((0.97, "stable"), (1.03, "unstable")):
        optimizer.param_groups[0]["lr"] = factor * exact
        assert band.lower < factor * exact < band.upper
        check = monitor.check()
        assert (check.state, check.exact) == (state, pytest.approx(exact, rel=1e-5))
        assert check.safe_lr == check.exact
        assert ", exact " in str(check)
    optimizer.param_groups[0]["lr"] = 0.5 * band.lower
    assert math.isnan(monitor.check().exact)  # nothing to settle


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adam, decay": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "nadam, decay": lambda p: torch.optim.NAdam(p, lr=1e-3, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "rmsprop, centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, weight_decay=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_people_use_is_watched(name):
    model, x, y = _problem()
    model.extra = nn.Parameter(torch.ones(3))  # without a gradient: it never moves, and Adam has no state for it
    optimizer = OPTIMIZERS[name](model.parameters())
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=10).attach(optimizer)
    _train(model, x, y, optimizer, 40)  # pytest makes an error of any warning but torch's own
    assert [c.step for c in monitor.history] == [10, 20, 30, 40]
    assert all(0 < c.lower <= c.upper < math.inf for c in monitor.history)


@pytest.mark.parametrize("name", ["nadam", "rmsprop", "rmsprop, centered", "adam, decay"])
def test_the_preconditioner_an_optimizer_implies_has_the_edge_it_really_has(name):
    """A frozen copy of the optimizer on a quadratic: below its edge it returns, above it leaves."""
    h = torch.tensor([1.0, 100.0], dtype=torch.float64)
    w = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([w])
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):  # gradients of a constant size, so that P has settled
        w.grad = h * torch.sign(torch.randn(2, generator=generator, dtype=torch.float64))
        optimizer.step()
    state = read_optimizer(optimizer, {"w": w})
    curvature = float(((h + state.decay) / state.preconditioner).max())
    edge = state.update.edge(curvature)
    frozen = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[w].items()}
    sizes = []
    for factor in (0.9, 1.1):
        with torch.no_grad():
            w.fill_(1e-3)
        for key, value in frozen.items():
            optimizer.state[w][key] = value.clone() if isinstance(value, torch.Tensor) else value
            if key in {"exp_avg", "momentum_buffer"}:
                optimizer.state[w][key].zero_()
        optimizer.param_groups[0]["lr"] = factor * edge
        for _ in range(600):
            w.grad = h * w.detach()
            optimizer.step()
            for key in ("exp_avg_sq", "square_avg", "grad_avg", "step"):  # P stays what it was
                if key in frozen:
                    optimizer.state[w][key].copy_(frozen[key])
            if "mu_product" in frozen:
                optimizer.state[w]["mu_product"].zero_()
        sizes.append(float(w.detach().abs().max()))
    assert sizes[0] < 1e-4
    assert not sizes[1] < 1


def test_an_optimizer_of_the_head_is_watched_on_the_head():
    model, x, y = _problem()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, products=40, suspects=96).attach(optimizer)
    exact = analyze(model, "cross_entropy", (x, y), parameters=["2.weight", "2.bias"])
    monitor.check()
    assert monitor.check().lambda1 == pytest.approx(exact.lambda_max, rel=1e-3)
    assert monitor.history[0].max_sample_curvature == pytest.approx(exact.max_sample_curvature, rel=1e-4)


@pytest.mark.parametrize("build", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop])
@pytest.mark.parametrize("at", [0, 5])
def test_nan_under_an_adaptive_optimizer_has_diverged_too(build, at):
    """Its second moments are NaN from then on, at the first step or later."""
    model, x, y = _problem()
    optimizer = build(model.parameters(), lr=0.01)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=5).attach(optimizer)
    _train(model, x, y, optimizer, at)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.warns(InstabilityWarning, match="DIVERGED"):
        _train(model, x, y, optimizer, 5)
    assert monitor.history[-1].state == "diverged"


def test_parameters_frozen_or_released_in_the_middle_of_a_run_are_named():
    model, x, y = _problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=5).attach(optimizer)
    _train(model, x, y, optimizer, 5)
    model[0].requires_grad_(False)
    with pytest.warns(MonitorWarning, match=r"'0\.bias' was frozen or released since; make a new StabilityMonitor"):
        _train(model, x, y, optimizer, 5)
    head = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=5).attach(optimizer)
    assert head.check().state == "stable"
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0\.bias' was frozen or released"):
        head.check()


def test_a_run_that_ended_in_nan_has_diverged_and_can_be_taken_up_again():
    model, x, y = _problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=5).attach(optimizer)
    _train(model, x, y, optimizer, 5)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.warns(InstabilityWarning, match="DIVERGED; the run is lost: go back to a checkpoint"):
        _train(model, x, y, optimizer, 5)
    assert [c.state for c in monitor.history] == ["stable", "diverged"]
    assert monitor.history[-1].lower == monitor.history[0].lower
    json.dumps(monitor.to_dict(), allow_nan=False)
    model.load_state_dict(weights)
    _train(model, x, y, optimizer, 5)
    assert monitor.history[-1].state == "stable"
    fresh = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, on_unstable=None).attach(optimizer)
    with torch.no_grad():
        model[2].bias[0] = math.inf
    assert fresh.check().state == "diverged"
    model.load_state_dict(weights)
    assert fresh.check().state == "stable"


def test_a_dead_network_is_not_stable():
    model, x, y = _problem(n=200)
    model[1] = nn.ReLU()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=100, on_unstable=None)
    monitor.attach(optimizer)
    _train(model, x, y, optimizer, 200)
    assert "diverged" not in {c.state for c in monitor.history}
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # every unit is off for every input
        model[2].weight.mul_(0.1)
    _train(model, x, y, optimizer, 200)
    assert [c.state for c in monitor.history[-2:]] == ["diverged", "diverged"]  # at the first look already


def test_a_loss_that_rises_above_the_safe_rate_is_unstable_and_below_it_is_not():
    record = LossRecord(start=2.0, chance=2.3)
    for loss in (2.0, 1.0, 1.0, 1.0):
        record.add(loss, 1.0)
    found = Band(lower=0.1, upper=1.0)
    assert state_of(0.5, found, math.nan, record) == "caution"
    for loss in (1.5, 1.6):
        record.add(loss, 1.0)
    assert state_of(0.5, found, math.nan, record) == "unstable"
    assert state_of(0.05, found, math.nan, record) == "stable"
    record.add(1.95, 1.0)
    assert state_of(0.05, found, math.nan, record) == "diverged"


@pytest.mark.parametrize(
    ("chance", "lower", "state"),
    [(2.3, math.inf, "diverged"), (2.3, 0.1, "stable"), (math.nan, math.inf, "stable")],
)
def test_a_loss_far_above_start_and_chance_is_lost_where_nothing_is_curved(chance, lower, state):
    record = LossRecord(start=1e-3, chance=chance)
    record.add(7.0, 1.0)
    assert state_of(0.05, Band(lower=lower, upper=math.inf), math.nan, record) == state


def test_noisy_targets_near_chance_are_not_taken_for_a_dead_network():
    torch.manual_seed(0)
    x = torch.randn(600, 4)
    y = (torch.rand(600) < (0.3 * x[:, 0]).sigmoid()).long()  # half a percent below the entropy at best
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=16, every=50, on_unstable=None)
    monitor.attach(optimizer)
    _train(model, x, y, optimizer, 600, batch=16)
    assert {c.state for c in monitor.history} <= {"stable", "caution"}


def test_a_hook_never_raises_and_tells_every_kind_of_failure_once(monkeypatch):
    model, x, y = _problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=2, every_cheap=2).attach(optimizer)
    monkeypatch.setattr(monitor._tracker, "visit", lambda *_, **__: 1 / 0)
    with pytest.warns(MonitorWarning, match=r"step 2: no check was possible \(ZeroDivisionError") as caught:
        _train(model, x, y, optimizer, 10)
    assert len(caught) == 1
    assert monitor.steps == 10
    monkeypatch.undo()
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [model[0].bias], "momentum": 0.5})
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not model[0].bias]
    with pytest.warns(MonitorWarning, match="same momentum"):
        _train(model, x, y, optimizer, 2)


def test_a_callers_own_function_may_stop_the_training():
    model, x, y = _problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=50.0)

    def stop(monitor, check):
        raise StopIteration(check.state)

    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=4, every=1, on_unstable=stop)
    monitor.attach(optimizer)
    with pytest.raises(StopIteration):
        _train(model, x, y, optimizer, 5)


def test_the_sharper_upper_end_lies_between_the_exact_threshold_and_that_of_one_direction():
    model, x, y = _problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.9)
    found = []
    for directions in (1, 8):
        monitor = StabilityMonitor(
            model, "cross_entropy", (x, y), batch_size=2, on_unstable=None, directions=directions
        ).attach(optimizer)
        found.append(monitor.check().upper)
    exact = analyze(model, "cross_entropy", (x, y)).lr_threshold(2).exact
    assert exact * (1 - 1e-3) <= found[1] < 0.95 * found[0]


def test_history_is_drawn(tmp_path):
    model, x, y = _problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=4, every=2, every_cheap=2)
    with pytest.raises(ValueError, match="checks: "):
        monitor.plot(tmp_path / "history.png")
    monitor.attach(optimizer)
    _train(model, x, y, optimizer, 8)
    assert monitor.plot(tmp_path / "history.png", losses=[(1, 1.0), (2, 0.5)]).stat().st_size > 10_000
    assert [step for step, *_ in monitor.sharpness_history] == [2, 4, 6, 8]


def _monitor(**options):
    model, x, y = _problem()
    return StabilityMonitor(model, "cross_entropy", (x, y), **{"batch_size": 4, **options})


def _attached(optimizer):
    model, x, y = _problem()
    return StabilityMonitor(model, "cross_entropy", (x, y), batch_size=4).attach(optimizer(model)).check()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _monitor(every=0), ValueError, "every: "),
        (lambda: _monitor(batch_size=None), ValueError, "batch_size: "),
        (lambda: _monitor(on_unstable="panic"), ValueError, "on_unstable: "),
        (lambda: _monitor(max_overhead=0.0), ValueError, "max_overhead: "),
        (lambda: _monitor().check(), RuntimeError, "attach"),
        (lambda: _attached(lambda m: torch.optim.Adagrad(m.parameters())), TypeError, "optimizer: .*Adagrad"),
        (lambda: _attached(lambda m: torch.optim.Adam(m.parameters())), ValueError, "optimizer: .*taken a step"),
        (lambda: _monitor(directions=0), ValueError, "directions: "),
        (lambda: _attached(lambda m: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1)), ValueError, "none of them"),
        (lambda: _attached(lambda m: torch.optim.SGD(m.parameters(), lr=1, maximize=True)), ValueError, "maximize"),
        (
            lambda: _attached(
                lambda m: torch.optim.SGD(
                    [{"params": m[0].parameters(), "momentum": 0.5}, {"params": m[2].parameters()}], lr=1
                )
            ),
            ValueError,
            "optimizer: .*same momentum",
        ),
    ],
)
def test_bad_input_of_the_monitor(call, error, message):
    with pytest.raises(error, match=message):
        call()


def _normalized(bias):
    """Batch normalization after a convolution and a linear layer, and biases that count."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(6, 4, 3), nn.Tanh(),
        nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip
    for layer in (model[0], model[7]):
        nn.init.zeros_(layer.bias)
        if not bias:
            layer.bias = None
    return model


def test_biases_that_batch_normalization_cancels_do_not_count():
    """Under Adam their vanishing gradients would let the curvature look a million times larger."""
    x, y = torch.randn(96, 1, 6, 6), torch.arange(96) % 3
    found = {}
    for bias in (True, False):
        model = _normalized(bias)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=32, every=10).attach(optimizer)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        _train(model, x, y, optimizer, 1)
        statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
        numbers = torch.random.get_rng_state()
        found[bias] = monitor.check()
        assert torch.equal(numbers, torch.random.get_rng_state())
        assert model.training
        for name, buffer in model.named_buffers():  # the training's own step moved them, the check did not
            assert torch.equal(buffer, statistics[name])
            assert not torch.equal(buffer, before[name])
        cancelled = {name for name, _ in model.named_parameters()} - monitor.parameters.keys()
        assert cancelled == ({"0.bias", "7.bias"} if bias else set())
        assert monitor.exact(max_samples=32).lr_threshold(32).upper > 1e-4
        _train(model, x, y, optimizer, 10)
        assert len(monitor.history) == 2
    assert found[True].lower == pytest.approx(found[False].lower, rel=0.05)
    frozen = _normalized(True).eval()  # statistics that do not move cancel nothing
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1)
    monitor = StabilityMonitor(frozen, "cross_entropy", (x, y), batch_size=32).attach(optimizer)
    monitor.check()
    assert "0.bias" in monitor.parameters


def test_the_full_analysis_takes_parameters_that_have_not_moved_yet():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randint(0, 5, (24, 3)), torch.arange(24) % 3  # four rows never get a gradient
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8).attach(optimizer)
    _train(model, x, y, optimizer, 2)
    exact = monitor.exact().lr_threshold(8).exact
    check = monitor.check()
    assert check.lower <= exact <= check.upper * (1 + 1e-3)
    nowhere = torch.full((sum(p.numel() for p in model.parameters()),), math.inf)
    with pytest.raises(ValueError, match="preconditioner: expected at least one parameter that moves"):
        analyze(model, "cross_entropy", (x, y), preconditioner=nowhere)


def test_the_full_analysis_of_a_head_is_about_the_head():
    model, x, y = _problem()
    optimizer = torch.optim.Adam(model[2].parameters(), lr=0.01)
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8).attach(optimizer)
    _train(model, x, y, optimizer, 2)
    assert monitor.exact().family.factors.shape[2] <= sum(p.numel() for p in model[2].parameters())
