import copy
import importlib

import pytest
import torch
from core_tensor.linalg.spectrum import SymmetricOperator, hutchinson_trace
from sgd_stability import CurvatureFamily, Sampling, Update, analyze, lr_threshold
from sgd_stability.curvature import truncated
from sgd_stability.curvature.losses import resolve_loss
from sgd_stability.curvature.network import make_network
from sgd_stability.curvature.spectra import (
    exact_gauss_newton_trace,
    gauss_newton_operator,
    hutch_plus_plus,
    network_of,
    spectral_density,
)
from sgd_stability.demo import digits, digits_network
from sgd_stability.report.maps import stability_map
from sgd_stability.theory import nested
from torch.nn import functional as F


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("sklearn")
    model = digits_network(0, hidden=24)
    x, y = digits(40)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        adam.zero_grad()
        F.cross_entropy(model(x), y).backward()
        adam.step()
    return model, x, y


def test_sample_directions_beat_eigenvectors_of_the_mean_alone(trained):
    model, x, y = trained
    exact = analyze(model, "cross_entropy", (x, y), method="gram")
    truncated = analyze(model, "cross_entropy", (x, y), method="truncated", k=40)
    star = exact.lr_threshold(1).exact
    ours = truncated.lr_threshold(1).upper / star - 1
    eigenvectors = lr_threshold(exact.family.truncate(40), Sampling(40, 1)).value / star - 1
    assert -1e-6 < ours < 0.01
    assert ours < eigenvectors
    assert truncated.lr_threshold(1).lower <= star
    assert truncated.lambda_max == pytest.approx(exact.lambda_max, rel=1e-3)
    assert torch.allclose(truncated.family.sample_curvature, exact.family.sample_curvature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_basis_that_does_not_fit_is_restarted(trained, monkeypatch, dtype):
    model, x, y = trained
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    size = sum(p.numel() for p in model.parameters())
    operator = gauss_newton_operator(network_of(model, "cross_entropy", (x, y)))
    whole = truncated.top_eigenvectors(operator, 6)
    # in float64 there is room for 14 vectors, in float32 for 4, so 12 in bfloat16 have to do
    monkeypatch.setattr(truncated, "_HELD", (14 if dtype == torch.float64 else 4) * size)
    restarted = truncated.top_eigenvectors(operator, 6)
    assert restarted.converged
    assert whole.products > 14  # so that there was a restart
    assert bool(((whole.values - restarted.values).abs() <= restarted.residuals + whole.residuals + 1e-14).all())
    assert truncated.default_directions(10_000) == 4
    monkeypatch.undo()
    assert truncated.default_directions(10_000) == 40
    assert truncated.default_directions(100_000_000) == 4
    report = analyze(model, "cross_entropy", (x, y), method="truncated")
    assert report.family.factors.shape[2] == 40


def test_trace_estimators_agree_with_the_exact_trace(trained):
    model, x, y = trained
    network = network_of(model, "cross_entropy", (x, y))
    exact = exact_gauss_newton_trace(network)
    assert exact == pytest.approx(analyze(model, "cross_entropy", (x, y)).trace, rel=1e-10)
    layers = [network_of(model, "cross_entropy", (x, y), parameters=[n]) for n, _ in model.named_parameters()]
    assert sum(map(exact_gauss_newton_trace, layers)) == pytest.approx(exact, rel=1e-10)
    operator = gauss_newton_operator(network)
    plus = hutch_plus_plus(operator, 60, generator=torch.Generator().manual_seed(0))
    plain = hutchinson_trace(operator, 60, generator=torch.Generator().manual_seed(0))
    assert plus.products == plain.products == 60
    assert abs(plus.value - exact) < 5 * plus.standard_error
    assert plus.standard_error < plain.standard_error


def test_spectral_density_has_the_moments_of_the_operator():
    values = torch.linspace(-1, 3, 50, dtype=torch.float64)
    operator = SymmetricOperator(lambda v: values * v, 50, torch.float64)
    found = spectral_density(operator, probes=6, steps=50, generator=torch.Generator().manual_seed(0))
    for power in range(4):  # a diagonal operator and sign probes: no variance at all
        assert found.moment(power) == pytest.approx(float((values**power).mean()), rel=1e-9, abs=1e-9)
    grid = torch.linspace(-3, 5, 2000, dtype=torch.float64)
    density = found.density(grid, 0.1)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, rel=1e-6)
    short = spectral_density(operator, probes=2, steps=3)
    assert short.moment(5) == pytest.approx(float((values**5).mean()), rel=1e-9)  # exact up to degree 2 steps - 1
    low_rank = spectral_density(SymmetricOperator(lambda v: 0 * v, 9, torch.float64), probes=1, steps=5)
    assert low_rank.nodes.tolist() == [0.0]


def test_a_large_problem_goes_the_truncated_way_by_itself(monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 20))
    data = (torch.randn(400, 5), torch.randint(0, 20, (400,)))
    assert analyze(model, "cross_entropy", data).method == "jacobian"  # few parameters: exact after all
    monkeypatch.setattr(importlib.import_module("sgd_stability.report.analysis"), "_DENSE_NUMBERS", 10_000)
    report = analyze(model, "cross_entropy", data, k=16)
    assert report.method == "truncated"
    assert report.complete
    threshold = report.lr_threshold(16)
    assert 0 < threshold.lower < threshold.upper
    verdicts = {report.verdict(f, 16).state for f in (0.5 * threshold.lower, 2 * threshold.upper)}
    assert verdicts == {"stable", "unstable"}
    middle = (threshold.lower * threshold.upper) ** 0.5
    assert report.verdict(middle, 16).state == "undecided"


def test_nonconvex_losses_take_the_signed_route():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()

    def tanh_error(z, t):
        return (z.tanh() - t).square().sum(1)

    report = analyze(model, tanh_error, (x, y))
    network = make_network(model, resolve_loss(tanh_error), x, y)
    assert network.factor.signs is not None
    hessian = analyze(model, tanh_error, (x, y), curvature="hessian")  # a linear model: Gauss-Newton is the Hessian
    assert report.lambda_max == pytest.approx(hessian.lambda_max, rel=1e-9)
    assert float(report.family.h.min()) == pytest.approx(float(hessian.family.h.min()), rel=1e-9)
    truncated = analyze(model, tanh_error, (x, y), method="truncated", k=8)
    assert truncated.max_sample_curvature == pytest.approx(report.max_sample_curvature, rel=1e-8)


@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_nested_subspaces_stop_at_the_threshold_of_the_whole_family(monkeypatch, outlier):
    generator = torch.Generator().manual_seed(0)
    decay = torch.linspace(0, -12, 60, dtype=torch.float64).exp()
    Z = torch.randn(80, 1, 60, generator=generator, dtype=torch.float64) * decay
    Z[3] *= outlier  # at small batch sizes this sample alone decides
    family = CurvatureFamily.from_factors(Z)
    monkeypatch.setattr(nested, "_FIRST", 8)
    last = []
    for batch_size in (1, 8, 64):
        sampling = Sampling(80, batch_size)
        sizes = []

        def problem(part, sampling=sampling, sizes=sizes):
            sizes.append(len(part.h))
            return lr_threshold(part, sampling)

        found = nested.Nested(family).solve(problem)
        exact = lr_threshold(family, sampling).value
        assert found.value == pytest.approx(exact, rel=1e-4)
        assert found.value >= exact * (1 - 1e-9)
        last.append(sizes[-1])
    assert min(last) < 60


def test_cells_of_the_map_agree_with_the_exact_curve():
    Z = torch.randn(150, 1, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Z = Z * torch.linspace(0, -4, 200, dtype=torch.float64).exp()
    Z[7] *= 10
    family = CurvatureFamily.from_factors(Z)
    star = lr_threshold(family, Sampling(150, 1)).value
    drawn = stability_map(family, 150, [0.9 * star, 1.1 * star], [1], "without_replacement", Update(), {})
    assert drawn.stable[:, 0].tolist() == [True, False]
