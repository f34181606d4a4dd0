import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lirank.explore.posterior import GaussianPosterior, LogisticPosterior, Posterior, rebuilt
from scipy.optimize import minimize


def _events(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(n, d, generator=generator, dtype=torch.float64)
    w = torch.randn(d, generator=generator, dtype=torch.float64)
    clicks = (torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(phi @ w)).double()
    return phi, w, clicks, torch.rand(n, generator=generator, dtype=torch.float64) + 0.1


def test_regression_is_the_textbook_formula():
    phi, w, _, u = _events(200, 5)
    y = phi @ w + 0.3
    found = GaussianPosterior.prior(5, 2.0, noise=0.5).updated(phi, y, u)
    precision = 2 * torch.eye(5, dtype=torch.float64) + phi.T @ torch.diag(u / 0.25) @ phi
    mean = torch.linalg.solve(precision, phi.T @ (u * y) / 0.25)
    torch.testing.assert_close(found.precision, precision, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.mean, mean, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.variance(phi), torch.einsum("ni,ij,nj->n", phi, precision.inverse(), phi))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(0, 60), st.integers(0, 1000), st.floats(0.1, 10.0))
def test_batches_equal_all_events_at_once(d, n, seed, scale):
    """To 1e-8 for features of ordinary size: the condition number is below 1 + 60 * 8 * (10 / 0.7)**2 * 5."""
    phi, w, _, u = _events(n, d, seed)
    phi = phi * scale
    prior = GaussianPosterior.prior(d, mean=w, noise=0.7)
    at_once = prior.updated(phi, phi @ w * 2, u)
    cuts = torch.tensor_split(torch.randperm(n, generator=torch.Generator().manual_seed(seed)), 3)
    batches = rebuilt(prior, [(phi[i], (phi @ w * 2)[i], u[i]) for i in cuts])
    torch.testing.assert_close(batches.mean, at_once.mean, rtol=0, atol=1e-8 * float(at_once.mean.norm() + 1))
    torch.testing.assert_close(batches.precision, at_once.precision, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 8), st.integers(0, 60), st.integers(0, 1000), st.sampled_from([1e-4, 1e-2, 1e2, 1e4]))
def test_batches_equal_all_at_any_scale_up_to_the_condition_number(d, n, seed, scale):
    phi, w, _, u = _events(n, d, seed)
    phi = phi * scale
    prior = GaussianPosterior.prior(d, mean=w, noise=0.7)
    at_once = prior.updated(phi, phi @ w * 2, u)
    cuts = torch.tensor_split(torch.randperm(n, generator=torch.Generator().manual_seed(seed)), 3)
    batches = rebuilt(prior, [(phi[i], (phi @ w * 2)[i], u[i]) for i in cuts])
    # both solve with a rounded matrix: their distance is a few roundings times its condition number
    size = at_once.mean.norm() + 1
    allowed = 1e-14 * float(torch.linalg.cond(at_once.precision))
    assert float((batches.mean - at_once.mean).norm() / size) <= max(allowed, 1e-13)


def test_clicks_find_the_mode_that_scipy_finds():
    phi, _, y, u = _events(300, 4, 1)
    offset = phi[:, 0] * 0.5
    prior = LogisticPosterior.prior(4, 0.7, mean=torch.ones(4))
    found = prior.updated(phi, y, u, offset)

    def objective(w):
        w = torch.tensor(w, dtype=torch.float64)
        logits = phi @ w + offset
        loss = (u * (torch.nn.functional.softplus(logits) - y * logits)).sum()
        return float(loss + 0.35 * (w - 1).square().sum())

    oracle = minimize(objective, torch.zeros(4).numpy(), method="BFGS", options={"gtol": 1e-9})
    assert objective(found.mean.numpy()) <= oracle.fun + 1e-9
    p = torch.sigmoid(phi @ found.mean + offset)
    expected = 0.7 * torch.eye(4, dtype=torch.float64) + phi.T @ torch.diag(u * p * (1 - p)) @ phi
    torch.testing.assert_close(found.precision, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_separable_clicks_converge(scale):
    phi = scale * torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, -2.0], [1.0, -3.0]], dtype=torch.float64)
    y = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    prior = LogisticPosterior.prior(2, 1e-6)
    found = prior.updated(phi, y)
    gradient = phi.T @ (torch.sigmoid(phi @ found.mean) - y) + 1e-6 * found.mean
    assert float(gradient.norm()) <= 1e-4 * scale
    assert torch.isfinite(found.mean).all()


def test_forgetting_leads_back_to_the_prior_and_keeps_the_mean_bounded():
    phi, w, _, _ = _events(500, 3)
    prior = GaussianPosterior.prior(3, mean=torch.full((3,), 0.2))
    posterior = prior.updated(phi, phi @ w)
    for _ in range(200):
        posterior = posterior.forgotten(0.9)
    torch.testing.assert_close(posterior.mean, prior.mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(posterior.precision, prior.precision, rtol=1e-4, atol=1e-4)
    # a world that does not change is not forgotten into something larger (b has to shrink with A)
    for day in range(50):
        batch, _, _, _ = _events(20, 3, day)
        posterior = posterior.forgotten(0.8).updated(batch, batch @ w)
    assert float((posterior.mean - w).norm()) < 0.15 * float(w.norm())
    assert posterior.forgotten(1.0).mean.allclose(posterior.mean)


def test_draws_have_the_mean_and_the_covariance():
    phi, w, _, _ = _events(50, 3)
    posterior = GaussianPosterior.prior(3).updated(phi, phi @ w)
    draws = posterior.sample(200_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(0), posterior.mean, rtol=0, atol=2e-3)
    torch.testing.assert_close(draws.T.cov(), posterior.precision.inverse(), rtol=0.03, atol=3e-4)


@pytest.mark.parametrize("kind", [GaussianPosterior, LogisticPosterior])
def test_saved_and_loaded(tmp_path, kind):
    phi, _, y, _ = _events(40, 3)
    options = {"noise": 0.25} if kind is GaussianPosterior else {}
    posterior = kind.prior(3, **options).updated(phi, y)
    posterior.save(tmp_path / "p.safetensors")
    found = Posterior.load(tmp_path / "p.safetensors")
    assert type(found) is kind
    assert torch.equal(found.mean, posterior.mean)
    assert torch.equal(found.updated(phi, y).mean, posterior.updated(phi, y).mean)
    raw = (tmp_path / "p.safetensors").read_bytes()
    (tmp_path / "p.safetensors").write_bytes(raw[:-9])
    with pytest.raises(ValueError, match=r"p\.safetensors: expected a posterior"):
        Posterior.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 4), torch.ones(2)), "features"),
        ((torch.ones(2, 3), torch.ones(3)), "targets"),
        ((torch.full((2, 3), math.nan), torch.ones(2)), "features"),
        ((torch.ones(2, 3), torch.tensor([0.5, 1.0])), "targets: expected 0 or 1"),
        ((torch.ones(2, 3), torch.ones(2), torch.tensor([1.0, -1.0])), "weights"),
        ((torch.ones(2, 3), torch.ones(2), None, torch.ones(3)), "offset"),
    ],
)
def test_events_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LogisticPosterior.prior(3).updated(*arguments)


def test_priors_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="precision"):
        LogisticPosterior.prior(3, 0.0)
    with pytest.raises(ValueError, match="noise"):
        GaussianPosterior.prior(3, noise=0.0)
    with pytest.raises(ValueError, match="keep"):
        LogisticPosterior.prior(3).forgotten(0.0)
