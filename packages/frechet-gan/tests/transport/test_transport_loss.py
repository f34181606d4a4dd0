import math
from itertools import permutations

import pytest
import torch
from core_tensor.dev.testing import assert_close, run_ranks
from frechet_gan import (
    BatchPopulation,
    EMAPopulation,
    FeatureStats,
    MultiEncoderLoss,
    PlanOptions,
    QueuePopulation,
    TransportLoss,
    frechet_distance,
)
from frechet_gan.choices import PLANS
from frechet_gan.transport.plans import make_plan
from scipy.stats import wasserstein_distance
from torch import nn


def _gradient(loss, fake, real=None):
    fake = fake.clone().requires_grad_()
    value = loss(fake, real)
    value.backward()
    return value.detach(), fake.grad


def _plain_frechet(fake_moments, real_moments):
    """Autograd through eigenvalues of the symmetric form, as an oracle for mixtures."""
    mean, second = fake_moments
    mean_r, covariance_r = real_moments
    covariance = second - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance_r)
    root = vectors * values.sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ covariance @ root).clamp_min(0).sqrt().sum()
    return (mean - mean_r).square().sum() + covariance.trace() + covariance_r.trace() - 2 * trace


@pytest.mark.parametrize("plan", [p for p in PLANS if p != "max_sliced"])
@pytest.mark.parametrize("n_real", [12, 24])
def test_gradient_is_the_values_derivative(samples, plan, n_real):
    real, fake = samples(n_real, 12, 4)
    options = PlanOptions(tolerance=1e-11, iterations=5000, epsilon=0.5, directions=16)

    def value(x):
        return make_plan(plan, options, torch.Generator().manual_seed(0))(x, real)[0]

    gradient = make_plan(plan, options, torch.Generator().manual_seed(0))(fake, real)[1]
    numeric = torch.empty_like(gradient)
    for i in range(12):
        for j in range(4):
            step = torch.zeros_like(fake)
            step[i, j] = 1e-5
            numeric[i, j] = (value(fake + step) - value(fake - step)) / 2e-5
    assert_close(plan, numeric, gradient, 1e-6)


def test_max_sliced_is_a_lower_bound_that_finds_the_one_separated_direction():
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(64, 20, generator=generator, dtype=torch.float64)
    fake = torch.randn(64, 20, generator=generator, dtype=torch.float64)
    fake[:, 3] *= 5
    options = PlanOptions(directions=32)
    value, gradient = make_plan("max_sliced", options, generator)(fake, real)
    axis = (fake[:, 3].sort().values - real[:, 3].sort().values).square().mean()
    assert axis * 0.999 <= value <= make_plan("assignment", options, generator)(fake, real)[0]
    assert gradient[:, 3].norm() > 0.9 * gradient.norm()


def test_assignment_equals_brute_force(samples):
    real, fake = samples(6, 6, 3)
    costs = torch.cdist(fake, real).square()
    best = min(sum(float(costs[i, p[i]]) for i in range(6)) / 6 for p in permutations(range(6)))
    value, _ = make_plan("assignment", PlanOptions(), torch.Generator())(fake, real)
    assert float(value) == pytest.approx(best, rel=1e-12)
    twice, _ = make_plan("assignment", PlanOptions(), torch.Generator())(fake, real.repeat_interleave(2, 0))
    assert float(twice) == pytest.approx(best, rel=1e-12)


def test_sinkhorn_tends_to_the_exact_distance_and_vanishes_at_equality(samples):
    real, fake = samples(40, 40, 3)
    exact = float(make_plan("assignment", PlanOptions(), torch.Generator())(fake, real)[0])
    sharp = float(make_plan("sinkhorn", PlanOptions(epsilon=0.005, iterations=3000), torch.Generator())(fake, real)[0])
    assert sharp == pytest.approx(exact, rel=0.04)
    value, gradient = make_plan("sinkhorn", PlanOptions(tolerance=1e-12, iterations=5000), torch.Generator())(
        real, real
    )
    assert abs(float(value)) < 1e-8
    assert gradient.abs().max() < 1e-8


def test_sliced_in_one_dimension_is_exact():
    x, y = torch.randn(30, 1, dtype=torch.float64), torch.randn(60, 1, dtype=torch.float64) + 1
    value, _ = make_plan("sliced", PlanOptions(directions=3), torch.Generator())(x, y)
    truth = (x.sort(0).values.repeat_interleave(2, 0) - y.sort(0).values).square().mean()
    assert float(value) == pytest.approx(float(truth))
    assert wasserstein_distance(x[:, 0], y[:, 0]) ** 2 <= float(value)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_regression_identity(samples, beta):
    """The regression's gradient is the derivative of the mixture's distance, through raw moments and divisor n."""
    real, fake = samples(60, 30, 5)
    _, old = samples(60, 50, 5, seed=7)
    reference = FeatureStats.from_features(real)
    loss = TransportLoss(reference=reference, population=EMAPopulation(beta, warmup=0))
    if beta:
        loss.observe(old)
    value, gradient = _gradient(loss, fake)
    x = fake.clone().requires_grad_()
    mean = (1 - beta) * x.mean(0) + beta * old.mean(0)
    second = (1 - beta) * x.T @ x / 30 + beta * old.T @ old / 50
    oracle = _plain_frechet((mean, second), (reference.mean, reference.covariance(0)))
    oracle.backward()
    assert_close("value", oracle.detach(), value, 1e-11)
    assert_close("gradient", x.grad, gradient, 1e-9)
    again = TransportLoss(reference=reference, population=EMAPopulation(beta, warmup=0), rescale=True)
    if beta:
        again.observe(old)
    assert_close("rescaled", gradient / (1 - beta), _gradient(again, fake)[1], 1e-12)


def test_departure_mixing_covariances_would_be_wrong(samples):
    """The tempting shortcut, mixing covariances and means, differs by the spread between the means."""
    real, fake = samples(60, 30, 5)
    old = fake + 3
    beta = 0.5
    x = fake.clone().requires_grad_()
    mean = (1 - beta) * x.mean(0) + beta * old.mean(0)
    second = (1 - beta) * x.T @ x / 30 + beta * old.T @ old / 30
    real_moments = (real.mean(0), torch.cov(real.T, correction=0))
    _plain_frechet((mean, second), real_moments).backward()
    right, x.grad = x.grad, None
    mean = (1 - beta) * x.mean(0) + beta * old.mean(0)
    covariance = (1 - beta) * torch.cov(x.T, correction=0) + beta * torch.cov(old.T, correction=0)
    _plain_frechet((mean, covariance + torch.outer(mean, mean)), real_moments).backward()
    assert (x.grad - right).norm() > 0.1 * right.norm()


def test_even_warm_up_is_the_pooled_sample(samples):
    _, fake = samples(4, 90, 5)
    real, _ = samples(60, 2, 5)
    reference = FeatureStats.from_features(real)
    loss = TransportLoss(reference=reference, population=EMAPopulation(0.999, warmup=1000))
    for part in fake.split(30):
        value = loss(part)
    assert_close("value", frechet_distance(reference, fake, ddof=0), value, 1e-8)


def test_queue_is_the_joined_sample(samples):
    real, fake = samples(80, 80, 5)
    for plan in ("gaussian", "assignment"):
        loss = TransportLoss(plan, population=QueuePopulation(40))
        loss.observe(fake[:20], real[:20])
        loss.observe(fake[20:60], real[20:60])  # pushes the first twenty out
        value, gradient = _gradient(loss, fake[60:], real[60:])
        joined = fake[20:].clone().requires_grad_()
        whole = TransportLoss(plan)(joined, real[20:])
        whole.backward()
        assert_close(f"{plan} value", whole.detach(), value, 1e-9)
        assert_close(f"{plan} gradient", joined.grad[40:], gradient, 1e-8)


def test_map_is_refreshed_every_k_steps(samples):
    real, fake = samples(60, 40, 5)
    loss = TransportLoss(population=EMAPopulation(0.5, warmup=0), refresh_every=2)
    maps = []
    for i in range(4):
        loss(fake + i, real)
        maps.append(loss.lazy_map.source)
    assert maps[0] is maps[1] is not maps[2] is maps[3]


def test_normalisations(samples):
    real, fake = samples(50, 40, 4)
    plain, gradient = _gradient(TransportLoss(), fake, real)
    scaled, gradient_sg = _gradient(TransportLoss(normalize="sg", constant=0.5), fake, real)
    assert_close("sg", plain / (plain + 0.5), scaled, 1e-12)
    assert_close("sg gradient", gradient / (plain + 0.5), gradient_sg, 1e-12)
    white = TransportLoss(normalize="whiten", epsilon=1e-9)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    mixing = turn * torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)  # its square scales the ridge
    first, moved = _gradient(white, fake, real)[0], _gradient(white, fake @ mixing + 7, real @ mixing + 7)[0]
    assert_close("affine invariance", first, moved, 1e-6)
    assert float(_gradient(white, real, real)[0]) < 1e-12
    reference = FeatureStats.from_features(real)
    by_stats, gradient_stats = _gradient(TransportLoss(normalize="whiten", reference=reference), fake)
    by_rows, gradient_rows = _gradient(TransportLoss(normalize="whiten"), fake, real)
    assert_close("reference", by_rows, by_stats, 1e-9)
    assert_close("reference gradient", gradient_rows, gradient_stats, 1e-8)


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 8)).double()

    def forward(self, z):
        return self.layers(z)


@pytest.mark.parametrize("plan", ["gaussian", "assignment", "sinkhorn", "sliced", "mmd"])
@pytest.mark.parametrize("normalize", ["none", "sg", "whiten"])
def test_virtual_batch_equals_the_full_batch(plan, normalize):
    net, z = _Net(), torch.randn(64, 6, dtype=torch.float64)
    real = torch.randn(64, 8, dtype=torch.float64)
    full = TransportLoss(plan, normalize=normalize, seed=3)(net(z), real)
    full.backward()
    truth = torch.cat([p.grad.flatten() for p in net.parameters()])
    net.zero_grad()
    loss = TransportLoss(plan, normalize=normalize, seed=3)
    total = 0.0
    with loss.virtual_batch() as batch:
        for part, reals in zip(z.split(8), real.split(8), strict=True):
            with torch.no_grad():
                batch.observe(net(part), reals)
        for part in z.split(8):
            value = batch.loss(net(part))
            value.backward()
            total += float(value.detach())
    assert total == pytest.approx(float(full.detach()), rel=1e-12)
    assert_close("gradient", truth, torch.cat([p.grad.flatten() for p in net.parameters()]), 1e-10)


def _too_few(loss, fake, real):
    with loss.virtual_batch() as batch:
        batch.observe(fake, real)
        batch.loss(fake[:4])


def test_virtual_batch_refuses_inexact_use():
    loss, real = TransportLoss(), torch.randn(8, 3)
    fake = torch.randn(8, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="saw 4 of 8"):
        _too_few(loss, fake, real)
    with loss.virtual_batch() as batch:
        with pytest.raises(ValueError, match="at least one micro-batch"):
            batch.loss(fake)
        batch.observe(fake, real)
        with pytest.raises(ValueError, match="batch normalisation"):
            batch.loss(fake + 1)
        with pytest.raises(RuntimeError, match="observe every micro-batch"):
            batch.observe(fake, real)
        batch.loss(fake)
        with pytest.raises(ValueError, match="at most 0 more"):
            batch.loss(fake)


def test_state_dict_resumes_exactly(samples, tmp_path):
    real, fake = samples(40, 40, 4)
    for options in (
        {"population": EMAPopulation(0.9, 10), "refresh_every": 3},
        {"population": QueuePopulation(50)},
        {"plan": "sliced"},
    ):
        loss, other = TransportLoss(**options), TransportLoss(**options, seed=5)
        for i in range(4):
            loss(fake + i, real)
        torch.save(loss.state_dict(), tmp_path / "state.pt")
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for i in range(3):
            (value, gradient), (value2, gradient2) = (_gradient(l, fake - i, real) for l in (loss, other))
            assert torch.equal(value, value2)
            assert torch.equal(gradient, gradient2)


def test_encoders_and_mixture():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).requires_grad_(False)
    fake, real = torch.rand(20, 1, 3, 3, requires_grad=True), torch.rand(30, 1, 3, 3)
    reference = FeatureStats.from_features(encoder(real))
    losses = [
        TransportLoss(encoder=encoder, reference=reference, normalize="sg"),
        TransportLoss(encoder=nn.Flatten(), normalize="sg"),
    ]
    total = MultiEncoderLoss(losses, weights=[1.0, 2.0])(fake, real)
    total.backward()
    assert total.detach() == pytest.approx(float(losses[0](fake).detach() + 2 * losses[1](fake, real).detach()))
    assert fake.grad.norm() > 0
    with pytest.raises(ValueError, match=r"encoder\(images\)"):
        TransportLoss(encoder=nn.Identity())(fake, real)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "exact"}, "plan: expected one of"),
        ({"plan": "sliced", "population": EMAPopulation()}, "population: expected a batch or a queue"),
        ({"plan": "mmd", "reference": FeatureStats(3)}, "reference: expected real features"),
        ({"refresh_every": 2}, "refresh_every: expected 1"),
        ({"population": EMAPopulation(), "normalize": "whiten"}, "normalize: expected a reference"),
        ({"population": QueuePopulation(), "normalize": "whiten"}, "normalize: expected a reference"),
        ({"epsilon": 0.0}, "epsilon: "),
    ],
)
def test_options_without_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        TransportLoss(**options)


def test_bad_batches():
    loss, x = TransportLoss(), torch.randn(6, 3)
    with pytest.raises(ValueError, match="real: expected real features or a reference, got neither"):
        loss(x)
    with pytest.raises(ValueError, match="real: expected features of width 3 as fake has, got 2"):
        loss(x, torch.randn(6, 2))
    with pytest.raises(ValueError, match="fake: expected at least two samples"):
        loss(x[:1], x)
    with pytest.raises(ValueError, match="fake: expected finite"):
        loss(x * math.nan, x)
    with pytest.raises(ValueError, match="real: expected a number of rows"):
        TransportLoss("assignment")(x, torch.randn(7, 3))
    with pytest.raises(ValueError, match="beta: "):
        EMAPopulation(1.0)
    with pytest.raises(ValueError, match="losses: expected at least one"):
        MultiEncoderLoss([])
    assert isinstance(loss.population, BatchPopulation)


DISTRIBUTED = [
    {},
    {"plan": "assignment", "normalize": "sg"},
    {"plan": "sliced"},
    {"normalize": "whiten"},
    {"population": EMAPopulation(0.9)},
    {"population": QueuePopulation(20)},
]


def _rank_gradients(rank, world_size, fake, real):
    results = []
    for options in DISTRIBUTED:
        for rows in (16, 5):
            own, target = (t.split([rows, t.shape[0] - rows])[rank] for t in (fake, real))
            value, gradient = _gradient(TransportLoss(**options), own, target)
            leaf = own.clone().requires_grad_()
            with TransportLoss(**options).virtual_batch() as batch:
                for pieces in zip(own.tensor_split(2), target.tensor_split(2), strict=True):
                    batch.observe(*pieces)
                for piece in leaf.tensor_split(2):
                    batch.loss(piece).backward()
            # the row's share of what averaging over the ranks leaves
            results.append((value, gradient / world_size, leaf.grad / world_size))
    return results


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_with_equal_and_unequal_batches_equal_one(samples):
    real, fake = samples(32, 32, 6)
    first, second = run_ranks(_rank_gradients, 2, fake, real)
    cases = [options for options in DISTRIBUTED for _ in range(2)]
    for options, a, b in zip(cases, first, second, strict=True):
        value, gradient = _gradient(TransportLoss(**options), fake, real)
        for part in (1, 2):
            assert_close(f"{options} gradient", gradient, torch.cat([a[part], b[part]]), 1e-12)
        for got in (a[0], b[0]):
            assert_close(f"{options} value", value, got, 1e-12)
