import itertools
import math

import numpy as np
import pytest
import torch
from core_tensor.dev.testing import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sgd_stability import SCHEMES, CurvatureFamily, Sampling, lr_threshold, quadratic, second_moment_radius
from sgd_stability.theory.bounds import paper_stability
from sgd_stability.theory.dynamics import Update, noise_gain
from sgd_stability.theory.growth import growth_grid
from sgd_stability.theory.second_moment import critical_mode, radius_from, second_moment_step


def _batches(n, B, scheme):
    """Every minibatch with its probability: (weights (n,), probability)."""
    if scheme == "bernoulli":
        for chosen in itertools.product([0, 1], repeat=n):
            k = sum(chosen)
            yield torch.tensor(chosen, dtype=torch.float64) / B, (B / n) ** k * (1 - B / n) ** (n - k)
    elif scheme == "with_replacement":
        for draws in itertools.product(range(n), repeat=B):
            yield torch.bincount(torch.tensor(draws), minlength=n).double() / B, n**-B
    else:
        for chosen in itertools.combinations(range(n), B):
            weights = torch.zeros(n, dtype=torch.float64)
            weights[list(chosen)] = 1 / B
            yield weights, 1 / math.comb(n, B)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("n", "B"), [(1, 1), (2, 1), (3, 2), (4, 3), (4, 4)])
def test_coefficients_by_enumerating_every_minibatch(scheme, n, B):
    H = quadratic.random_hessians(n, 3, 2, "isotropic", seed=n)
    M = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    M = M + M.T
    exact = torch.zeros(3, 3, dtype=torch.float64)
    for weights, probability in _batches(n, B, scheme):
        G = torch.einsum("i,iab->ab", weights, H)
        exact += probability * G @ M @ G
    sampling = Sampling(n, B, scheme)
    formula = sampling.a * H.mean(0) @ M @ H.mean(0) + sampling.s * (H @ M @ H).mean(0)
    assert_close("E[GMG]", exact, formula, 1e-13)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_exact_threshold_equals_the_dense_pencil_and_the_kronecker_radius(scheme, oracle):
    for seed in range(40):
        H, sampling = oracle.random_family(seed, scheme, largest_d=8)
        family = CurvatureFamily.from_hessians(H)
        found = lr_threshold(family, sampling)
        assert found.converged
        assert found.value == pytest.approx(oracle.dense_threshold(H, sampling), rel=1e-8)
        for factor in (0.97, 1.03):
            dense = quadratic.second_moment_matrix(family.hessians(), factor * found.value, sampling)
            radius = float(torch.linalg.eigvalsh(dense).max())
            assert (radius < 1) == (factor < 1)
            mine = second_moment_radius(family, factor * found.value, sampling)
            assert mine.value == pytest.approx(radius, rel=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("B", [1, 3])
def test_monte_carlo_growth_within_standard_errors(scheme, B):
    H = quadratic.random_hessians(6, 4, 2, "clustered", seed=3)
    family = CurvatureFamily.from_hessians(H)
    sampling = Sampling(6, B, scheme)
    # well below eta*: at it the fourth moment diverges, and with it the standard error of the mean square
    lr = 0.6 * lr_threshold(family, sampling).value
    growth = quadratic.simulate(family, lr, sampling, steps=6, paths=40_000, seed=1)
    assert bool(((growth.exact - growth.simulated).abs() < 4 * growth.standard_error).all())


@pytest.mark.parametrize(("n", "sigma", "B"), [(16, 1, 2), (16, 4, 2), (16, 16, 2), (64, 8, 4), (10, 3, 1)])
def test_theorem_2_family_has_exactly_its_threshold(n, sigma, B):
    family = CurvatureFamily.from_hessians(quadratic.grouped_hessians(n, sigma, 1.7))
    sampling = Sampling(n, B, "bernoulli")
    assert family.coherence == pytest.approx(sigma, rel=1e-12)
    assert lr_threshold(family, sampling).value == pytest.approx(paper_stability(1.7, sigma, sampling).lr, rel=1e-10)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 999), st.sampled_from(SCHEMES), st.floats(1e-6, 1e6))
def test_scale_rotation_and_permutation(oracle, seed, scheme, scale):
    H, sampling = oracle.random_family(seed, scheme)
    base = lr_threshold(CurvatureFamily.from_hessians(H), sampling).value
    q, _ = torch.linalg.qr(torch.randn(H.shape[1], H.shape[1], dtype=torch.float64))
    order = torch.randperm(len(H))
    moved = CurvatureFamily.from_hessians(scale * (q @ H[order] @ q.T))
    assert lr_threshold(moved, sampling).value == pytest.approx(base / scale, rel=1e-7)
    assert moved.coherence == pytest.approx(CurvatureFamily.from_hessians(H).coherence, rel=1e-6)


def test_three_constructors_agree():
    Z = torch.randn(7, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = Z.reshape(14, 5)
    families = [
        CurvatureFamily.from_factors(Z),
        CurvatureFamily.from_gram(flat @ flat.T, 7),
        CurvatureFamily.from_hessians(Z.mT @ Z),
    ]
    sampling = Sampling(7, 2)
    for family in families:
        assert_close("h", families[0].h, family.h, 1e-12)
        assert_close("L_i", families[0].sample_curvature, family.sample_curvature, 1e-12)
        assert_close("S", families[0].coherence_matrix, family.coherence_matrix, 1e-12)
        assert lr_threshold(family, sampling).value == pytest.approx(lr_threshold(families[0], sampling).value)


def test_reduced_noise_operator_equals_the_dense_one():
    H = quadratic.random_hessians(6, 4, 4, "isotropic", seed=2)
    H = H - 3 * torch.eye(4) * torch.rand(6, 1, 1, dtype=torch.float64)  # indefinite
    family = CurvatureFamily.from_hessians(H)
    dense = family.hessians()
    assert family.signs is not None
    assert_close("spectra", torch.linalg.eigvalsh(H), torch.linalg.eigvalsh(dense), 1e-11)
    M = torch.randn(4, 4, dtype=torch.float64)
    assert_close("noise", (dense @ (M + M.T) @ dense).mean(0), family.noise(M + M.T), 1e-12)
    assert_close("H", torch.diag(family.h), dense.mean(0), 1e-12)
    forms = torch.einsum("iab,am,bm->im", dense, M, M)
    assert_close("forms", forms, family.quadratic_forms(M), 1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_degenerate_families(scheme):
    zero = CurvatureFamily.from_hessians(torch.zeros(4, 3, 3, dtype=torch.float64))
    assert lr_threshold(zero, Sampling(4, 2, scheme)).value == math.inf
    assert second_moment_radius(zero, 1.0, Sampling(4, 2, scheme)).value == 1
    assert math.isnan(zero.coherence)
    one = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    same = CurvatureFamily.from_hessians(one.expand(5, 3, 3))
    assert len(same.h) == 2
    if scheme != "bernoulli":  # identical samples leave no noise, whatever is drawn; Bernoulli varies the batch size
        assert lr_threshold(same, Sampling(5, 2, scheme)).value == pytest.approx(1.0)
    full = Sampling(5, 5, scheme)
    if scheme != "with_replacement":
        assert full.s == 0
        assert lr_threshold(CurvatureFamily.from_hessians(one.expand(5, 3, 3)), full).value == pytest.approx(1.0)


def test_indefinite_families_are_never_stable_where_they_push_outwards():
    H = torch.diag(torch.tensor([1.0, -0.1], dtype=torch.float64)).expand(3, 2, 2)
    assert lr_threshold(CurvatureFamily.from_hessians(H), Sampling(3, 1)).value == 0
    flat = torch.stack([torch.diag(torch.tensor([1.0, s], dtype=torch.float64)) for s in (1.0, -1.0)])
    assert lr_threshold(CurvatureFamily.from_hessians(flat), Sampling(2, 1)).value == 0  # noise where H is flat
    assert lr_threshold(CurvatureFamily.from_hessians(flat), Sampling(2, 2)).value == pytest.approx(2)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.floats(0, 1), st.integers(0, 50))
def test_make_hessians_meets_coherence_and_sharpness(n, share, seed):
    sigma = 1 + share * (n - 1)
    family = CurvatureFamily.from_hessians(quadratic.make_hessians(n, n + 1, sigma, 3.0, seed=seed))
    assert family.coherence == pytest.approx(sigma, rel=1e-6)
    assert family.lambda_max == pytest.approx(3.0, rel=1e-9)


def test_truncation_is_an_upper_bound_that_tightens():
    family = CurvatureFamily.from_hessians(quadratic.random_hessians(12, 8, 2, "dominant", seed=5))
    sampling = Sampling(12, 1)
    exact = lr_threshold(family, sampling).value
    truncated = [lr_threshold(family.truncate(k), sampling).value for k in range(1, 9)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(truncated))
    assert truncated[-1] == pytest.approx(exact)
    assert truncated[0] > exact


def test_the_step_keeps_symmetric_matrices_and_positivity():
    family = CurvatureFamily.from_hessians(quadratic.random_hessians(5, 4, 1, "isotropic", seed=1))
    image = second_moment_step(family, torch.eye(len(family.h), dtype=torch.float64), 0.3, Sampling(5, 2))
    assert torch.allclose(image, image.T)
    assert float(torch.linalg.eigvalsh(image)[0]) > -1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 3]), st.floats(0.2, 3.0))
def test_radius_is_the_dense_one_also_where_directions_are_nearly_flat(seed, batch_size, times):
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.tensor([0.0, -1.0, -4.0, -7.0], dtype=torch.float64)
    family = CurvatureFamily.from_factors(torch.randn(6, 1, 4, generator=generator, dtype=torch.float64) * scales)
    sampling = Sampling(6, batch_size, "without_replacement")
    lr = times * lr_threshold(family, sampling).value
    r = len(family.h)
    basis = torch.eye(r * r, dtype=torch.float64).reshape(-1, r, r)
    T = torch.stack([second_moment_step(family, M, lr, sampling).reshape(-1) for M in basis])
    dense = float(torch.linalg.eigvalsh((T + T.T) / 2).max())
    for tolerance in (1e-5, 1e-8):
        found = second_moment_radius(family, lr, sampling, tolerance=tolerance)
        assert abs(found.value - dense) <= 2 * tolerance * max(dense, 1.0)


@pytest.mark.parametrize("seed", [371, 373, *range(1, 21, 2)])
def test_a_mode_that_overtakes_above_the_threshold_is_found_at_a_loose_tolerance(seed):
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(3, 14)), int(rng.integers(2, 7))
    diagonals = np.exp(2 * rng.normal(size=(n, d))) * (rng.random((n, d)) < 0.4)  # commuting: modes never mix
    family = CurvatureFamily.from_hessians(torch.diag_embed(torch.tensor(diagonals)))
    sampling = Sampling(n, int(rng.integers(1, n)))
    critical = critical_mode(family, sampling)
    r = len(family.h)
    for factor in (0.9, 1.1, 1.5, 3.0):
        lr = factor * critical[0].value
        units = torch.eye(r * r, dtype=torch.float64).reshape(-1, r, r)
        images = [second_moment_step(family, (unit + unit.T) / 2, lr, sampling).reshape(-1) for unit in units]
        dense = float(torch.linalg.eigvals(torch.stack(images, 1)).abs().max())
        assert radius_from(family, lr, sampling, critical, tolerance=1e-5).value == pytest.approx(dense, rel=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_cell_of_a_grid_is_the_radius_of_the_dense_operator(scheme, oracle):
    for seed in range(16):
        H, drawn = oracle.random_family(seed, scheme, largest_d=7)
        family = CurvatureFamily.from_hessians(H)
        samplings = [Sampling(drawn.n, B, scheme) for B in sorted({1, drawn.batch_size, drawn.n})]
        thresholds = [lr_threshold(family, sampling).value for sampling in samplings]
        lrs = np.geomspace(min(thresholds) / 3, 2 * max(thresholds), 5).tolist()
        grid = growth_grid(family, lrs, samplings, Update())
        for j, sampling in enumerate(samplings):
            for i, lr in enumerate(lrs):
                dense = quadratic.second_moment_matrix(family.hessians(), lr, sampling)
                assert float(grid[i, j]) == pytest.approx(float(torch.linalg.eigvalsh(dense).max()), rel=1e-7)


def test_a_grid_of_indefinite_or_zero_families():
    Z = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(5, 2)
    family = CurvatureFamily.from_factors(Z, signs)
    for sampling in (Sampling(5, 2), Sampling(5, 2, "with_replacement")):
        dense = quadratic.second_moment_matrix(family.hessians(), 0.1, sampling)
        found = growth_grid(family, [0.1], [sampling], Update())
        assert float(found) == pytest.approx(float(torch.linalg.eigvalsh(dense).max()), rel=1e-8)
    zero = CurvatureFamily.from_factors(torch.zeros(3, 1, 2, dtype=torch.float64))
    assert growth_grid(zero, [0.1], [Sampling(3, 1)], Update()).tolist() == [[1.0]]


def test_a_grid_restarts_in_little_memory(monkeypatch):
    monkeypatch.setattr("sgd_stability.theory.growth._NUMBERS", 1)
    monkeypatch.setattr("sgd_stability.theory.growth._LEAST", 8)
    Z = torch.randn(40, 1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    family = CurvatureFamily.from_factors(Z * torch.linspace(0, -3, 12, dtype=torch.float64).exp())
    samplings, lrs = [Sampling(40, B) for B in (1, 4, 16)], [0.1, 0.5, 1.0, 2.0]
    grid = growth_grid(family, lrs, samplings, Update())
    for j, sampling in enumerate(samplings):
        for i, lr in enumerate(lrs):
            dense = quadratic.second_moment_matrix(family.hessians(), lr, sampling)
            assert float(grid[i, j]) == pytest.approx(float(torch.linalg.eigvalsh(dense).max()), rel=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_noise_gains_of_all_batch_sizes_follow_from_one(scheme, oracle):
    H, _ = oracle.random_family(3, scheme, largest_d=6)
    family, update = CurvatureFamily.from_hessians(H), Update(momentum=0.9)
    samplings = [Sampling(len(H), B, scheme) for B in range(1, len(H) + 1)]
    edge = update.edge(family.lambda_max)
    grid = growth_grid(family, [0.3 * edge, 1.1 * edge], samplings, update)
    for gain, sampling in zip(grid[0].tolist(), samplings, strict=True):
        alone = noise_gain(family, 0.3 * edge, sampling, update)[0].value if sampling.s else 0.0
        assert gain == pytest.approx(alone, rel=1e-6)
    assert bool(grid[1].isinf().all())
