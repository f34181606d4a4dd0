import pytest
import torch
from sgd_stability import SCHEMES, CurvatureFamily, Sampling, Update, all_bounds, lr_threshold, quadratic
from sgd_stability.theory.bounds import (
    curvature_stability,
    momentum_stability,
    paper_instability,
    paper_stability,
    sample_instability,
)
from sgd_stability.theory.dynamics import update_threshold


def _violations(scheme, families, oracle):
    found = []
    for seed in families:
        H, sampling = oracle.random_family(seed, scheme)
        exact = oracle.dense_threshold(H, sampling)
        for bound in all_bounds(CurvatureFamily.from_hessians(H), sampling):
            if bound.side == "stable_below" and bound.lr > exact * (1 + 1e-9):
                found.append((seed, bound))
            if bound.side == "unstable_above" and bound.lr < exact * (1 - 1e-9):
                found.append((seed, bound))
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_certified_bound_is_violated(scheme, oracle):
    assert _violations(scheme, range(150), oracle) == []


def test_theorem_1_fails_without_replacement_and_is_marked_heuristic(oracle):
    failures = 0
    for seed in range(150):
        H, sampling = oracle.random_family(seed, "without_replacement")
        family = CurvatureFamily.from_hessians(H)
        bound = paper_instability(family.lambda_max, family.coherence, sampling)
        assert bound.side == "heuristic"
        failures += bound.lr < oracle.dense_threshold(H, sampling) * (1 - 1e-9)
    assert failures > 0


def test_stability_with_bernoulli_coefficients_fails_with_replacement(oracle):
    failures = 0
    for seed in range(150):
        H, sampling = oracle.random_family(seed, "with_replacement")
        family = CurvatureFamily.from_hessians(H)
        paper = Sampling(sampling.n, sampling.batch_size, "bernoulli")
        wrong = curvature_stability(family.lambda_max, family.max_sample_curvature, paper)
        failures += wrong.lr > oracle.dense_threshold(H, sampling) * (1 + 1e-9)
    assert failures > 0


def test_theorem_1_needs_its_strict_inequality():
    H = torch.diag_embed(torch.eye(2, dtype=torch.float64))
    family = CurvatureFamily.from_hessians(H)
    sampling = Sampling(2, 1, "bernoulli")
    assert paper_instability(family.lambda_max, family.coherence, sampling).lr == pytest.approx(2)
    assert lr_threshold(family, sampling).value == pytest.approx(2)


def test_looseness_of_the_two_theorems():
    sampling = Sampling(1024, 1, "bernoulli")
    r, sigma = sampling.r, 1.0
    one = paper_instability(1.0, sigma, sampling).lr
    assert one / paper_stability(1.0, sigma, sampling).lr == pytest.approx((sigma + r) / (2 * r**0.5))


def test_zero_noise_leaves_gradient_descent():
    family = CurvatureFamily.from_hessians(quadratic.random_hessians(5, 3, 1, "isotropic", seed=0))
    full = Sampling(5, 5)
    assert sample_instability(family, full).lr == float("inf")
    bounds = {b.name: b.lr for b in all_bounds(family, full)}
    assert bounds["lyapunov"] == pytest.approx(2 / family.lambda_max)
    assert lr_threshold(family, full).value == pytest.approx(2 / family.lambda_max)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "update",
    [
        Update(momentum=0.9),
        Update(momentum=0.5, dampening=0.5),
        Update(momentum=0.9, weight_decay=0.1),
        Update(weight_decay=0.3),
        Update(momentum=0.9, nesterov=True),
        Update(momentum=0.5, nesterov=True, weight_decay=0.1),
        Update(momentum=0.9, dampening=0.9, weight_decay=0.1, decoupled=True),
        Update(weight_decay=0.5, decoupled=True),
    ],
)
def test_momentum_bound_certifies_stability(scheme, update, oracle):
    for seed in range(10):
        H, sampling = oracle.random_family(seed, scheme)
        family = CurvatureFamily.from_hessians(H)
        bound = momentum_stability(family.lambda_max, family.max_sample_curvature, sampling, update)
        assert 0 < bound.lr <= update_threshold(family, sampling, update).value * (1 + 1e-8)


@pytest.mark.parametrize(
    "update",
    [
        Update(momentum=0.9),
        Update(momentum=0.5, dampening=0.5),
        Update(momentum=0.9, dampening=0.9, weight_decay=0.2),
        Update(momentum=0.9, nesterov=True),
        Update(momentum=0.9, dampening=0.9, weight_decay=0.2, decoupled=True),
    ],
)
def test_momentum_bound_is_as_large_as_its_proof_allows(update):
    """Without noise it is the full-batch edge; with noise s L h K_hh reaches 1 for some h, and not before."""
    assert momentum_stability(3.0, 5.0, Sampling(8, 8), update).lr == pytest.approx(update.edge(3.0), rel=1e-5)
    sampling = Sampling(4, 1, "bernoulli")
    bound = momentum_stability(1.0, 4.0, sampling, update).lr
    h = torch.linspace(1e-3, 1, 400, dtype=torch.float64)
    for factor, most in ((0.5, 1.0), (1.0, 1.0 + 1e-3)):
        assert sampling.s * 4.0 * float((h * update.response(factor * bound, h).diagonal()).max()) <= most
    assert sampling.s * 4.0 * float((h * update.response(1.01 * bound, h).diagonal()).max()) > 1


def test_momentum_bound_of_numbers_worked_out_by_hand():
    # s = 3/7, beta = 1/2, tau = 1/2: 2 * 1.5 / (0.5 * (1 + 3/7 * 2 * 3)) with s = (8 - 2) / (2 * 7)
    found = momentum_stability(1.0, 2.0, Sampling(8, 2), Update(momentum=0.5, dampening=0.5)).lr
    assert found == pytest.approx(3.0 / (0.5 * (1 + 3 / 7 * 2 * 3)), rel=1e-12)


def test_truncated_and_indefinite_families_certify_no_stability():
    H = quadratic.random_hessians(8, 5, 2, "isotropic", seed=0)
    names = {b.name for b in all_bounds(CurvatureFamily.from_hessians(H).truncate(2), Sampling(8, 2))}
    assert names.isdisjoint({"lyapunov", "curvature"})
    indefinite = CurvatureFamily.from_hessians(H - 2 * torch.eye(5))
    with pytest.raises(ValueError, match="positive semidefinite"):
        all_bounds(indefinite, Sampling(8, 2))
