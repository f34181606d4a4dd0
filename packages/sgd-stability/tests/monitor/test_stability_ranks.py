"""Two gloo processes give what one process gives."""

import math

import pytest
import torch
from core_tensor.dev.testing import run_ranks
from sgd_stability import StabilityMonitor, analyze
from torch import nn
from torch.nn import functional as F


def _problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, torch.randn(21, 4).double(), torch.randint(0, 3, (21,))


def _reports(distributed):
    model, x, y = _problem()
    found = []
    for options in (
        {"method": "truncated", "k": 8},
        {"method": "truncated", "k": 8, "curvature": "hessian"},
        {"method": "truncated", "k": 8, "preconditioner": torch.linspace(1, 2, 51).double()},
        {"method": "gram"},
        {"method": "gram", "max_samples": 10},
    ):
        report = analyze(model, "cross_entropy", (x, y), distributed=distributed, **options)
        ends = [] if report.curvature == "hessian" else [report.lr_threshold(4).lower, report.lr_threshold(4).upper]
        found.append([report.lambda_max, report.max_sample_curvature, report.trace, report.gradient_rms, *ends])
    return found


def _checks(distributed):
    model, x, y = _problem()
    trained = nn.parallel.DistributedDataParallel(model) if distributed else model
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    monitor = StabilityMonitor(
        trained, "cross_entropy", (x, y), batch_size=6, every=2, every_cheap=3, max_overhead=1e9, settle=True,
        distributed=distributed,
    ).attach(optimizer)  # fmt: skip
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(trained(x), y).backward()
        optimizer.step()
    found = [[c.step, c.lambda1, c.lower, c.upper, *c.culprits] for c in monitor.history]
    return found, [list(entry) for entry in monitor.sharpness_history]


def _both(rank, size):
    error = ""
    try:
        model, x, y = _problem()
        analyze(model, "cross_entropy", (x + rank, y + 0 * rank) if rank else (x, y.flip(0)), distributed=True)
    except ValueError as raised:
        error = str(raised)
    return _reports(True), _checks(True), error


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_equal_one():
    reports, (checks, sharpness) = _reports(False), _checks(False)
    for theirs, (their_checks, their_sharpness), error in run_ranks(_both, 2):
        assert [len(row) for row in theirs] == [len(row) for row in reports]
        for mine, other in zip(reports, theirs, strict=True):
            assert other == pytest.approx(mine, rel=1e-6, nan_ok=True)
        for mine, other in zip(checks + sharpness, their_checks + their_sharpness, strict=True):
            assert other == pytest.approx(mine, rel=1e-6)
        assert "data: expected the same on every rank" in error


def test_without_a_process_group_there_is_nothing_to_share():
    model, x, y = _problem()
    with pytest.raises(ValueError, match="distributed: expected an initialised process group"):
        analyze(model, "cross_entropy", (x, y), distributed=True)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_models_are_unwrapped(wrap):
    model, x, y = _problem()
    expected = analyze(model, "cross_entropy", (x, y)).lr_threshold(3).exact
    found = analyze(wrap(model), "cross_entropy", (x, y)).lr_threshold(3).exact
    assert math.isclose(found, expected, rel_tol=1e-9)
