import math

import pytest
import scipy.linalg
import torch
from core_tensor.dev.testing import assert_close
from frechet_gan import FeatureStats, TransportLoss, frechet_distance, frechet_distance_from_moments, gaussian_map
from frechet_gan.frechet.factors import polar_gram
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


def _value_and_gradients(x, y, **options):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = frechet_distance(x, y, **options)
    value.backward()
    return value.detach(), x.grad, y.grad


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize(("n", "m", "d"), [(5, 5, 3), (4, 6, 5), (3, 3, 6), (2, 4, 3), (6, 2, 1)])
def test_value_and_gradient_equal_60_digits(mp_frechet, samples, n, m, d, ddof):
    x, y = samples(n, m, d, seed=n + d)
    value, gradient_x, gradient_y = _value_and_gradients(x, y, ddof=ddof)
    truth, truth_y = mp_frechet(x, y, ddof)
    _, truth_x = mp_frechet(y, x, ddof)
    assert abs(float(value) - truth) <= 1e-12 * truth
    if min(n, m, d + 1) > 2:  # with one centred direction the finite difference sees the kink of |.| only
        assert_close("gradient x", truth_x, gradient_x, 1e-8)
    assert_close("gradient y", truth_y, gradient_y, 1e-8)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 60, 8), (64, 64, 63), (30, 300, 20)])
def test_engines_agree_on_full_rank_samples(samples, n, m, d):
    x, y = samples(n, m, d)
    reference = _value_and_gradients(x, y, method="svd")
    for method, ratio in (("auto", 1e-10), ("eigh", 1e-7)):
        for name, truth, got in zip(
            ("value", "x", "y"), reference, _value_and_gradients(x, y, method=method), strict=True
        ):
            assert_close(f"{method} {name}", truth, got, ratio)
    assert_close("polar", reference[0], _value_and_gradients(x, y, method="polar")[0], 1e-3)
    assert_close("newton_schulz", reference[0], _value_and_gradients(x, y, method="newton_schulz")[0], 3e-2)
    stats = [FeatureStats.from_features(t) for t in (x, y)]
    assert_close("stats", reference[0], frechet_distance(*stats), 1e-9)
    product = torch.cov(x.T) @ torch.cov(y.T)
    root = torch.from_numpy(scipy.linalg.sqrtm(product.numpy()).real.copy())
    plain = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace() + torch.cov(y.T).trace() - 2 * root.trace()
    assert_close("sqrtm", reference[0], plain, 1e-6)


def test_departure_newton_schulz_on_the_product_is_inaccurate(samples):
    x, y = samples(64, 64, 128)
    exact = _value_and_gradients(x, y)
    paper = _value_and_gradients(x, y, method="newton_schulz")
    assert abs(float(paper[0] / exact[0]) - 1) > 1e-5
    assert float((paper[2] - exact[2]).norm() / exact[2].norm()) > 1e-2


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (40, 40), (23, 40), (40, 23)])
@pytest.mark.parametrize(("condition", "error"), [(1e2, 1e-12), (1e3, 1e-10), (1e5, 1e-10), (1e9, 1e-6), (1e300, 1.0)])
def test_polar_factor_at_any_condition_number(rows, columns, condition, error):
    torch.manual_seed(0)
    rank = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64))[0] for size in (rows, columns))
    singular = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    norm, polar = polar_gram(u * singular @ v.T)
    assert_close("nuclear norm", singular.sum(), norm, 1e-14)
    assert_close("orthogonal", torch.eye(rank).double(), polar @ polar.T if rows == rank else polar.T @ polar, error)
    if condition < 1e300:
        assert_close("polar factor", u @ v.T, polar, error)


def test_gradcheck(samples):
    x, y = samples(5, 7, 3)
    for method in ("auto", "svd", "eigh"):
        assert torch.autograd.gradcheck(
            lambda a, b, m=method: frechet_distance(a, b, method=m), (x.requires_grad_(), y.requires_grad_())
        )


def test_sample_against_statistics_has_the_same_gradient(samples):
    x, y = samples(50, 20, 30)
    reference = FeatureStats.from_features(x)
    _, _, truth = _value_and_gradients(x, y)
    y = y.clone().requires_grad_()
    value = frechet_distance(reference, y)
    value.backward()
    assert_close("value", frechet_distance(x, y.detach()), value.detach(), 1e-9)
    assert_close("gradient", truth, y.grad, 1e-6)
    assert_close("swapped", value.detach(), frechet_distance(y.detach(), reference), 1e-12)


def test_float32_and_bfloat16_inputs(samples):
    x, y = samples(64, 64, 128, dtype=torch.float32)
    single, double = _value_and_gradients(x, y), _value_and_gradients(x.double(), y.double())
    for name, truth, got in zip(("value", "x", "y"), double, single, strict=True):
        assert got.dtype == torch.float32
        assert_close(name, truth, got, 1e-6)
    assert frechet_distance(x.bfloat16(), y.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_do_not_overflow(samples, dtype):
    x, y = ((t * 300).to(dtype) for t in samples(64, 64, 128))  # distances far beyond 65504
    y.requires_grad_()
    value = frechet_distance(x, y)
    truth = float(frechet_distance(x.double(), y.detach().double()))
    assert float(value.detach()) == pytest.approx(truth, rel=1e-6)
    value.backward()
    assert y.grad.dtype == dtype
    assert torch.isfinite(y.grad).all()
    for normalize in ("none", "sg"):
        y.grad = None
        loss = TransportLoss(normalize=normalize)(y, x)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(y.grad).all()
    stats = FeatureStats.from_features(x)
    assert torch.isfinite(stats.covariance()).all()


def test_second_derivative_is_refused(samples):
    x, y = samples(5, 5, 3)
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(frechet_distance(x, y), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(("n", "d"), [(16, 32), (64, 16)])
def test_collapsed_sample_escapes(samples, n, d):
    x, _ = samples(n, n, d)
    y = x.mean(0).expand(n, d).clone()  # means agree: only the covariance can pull
    value, _, gradient = _value_and_gradients(x, y)
    assert torch.isfinite(gradient).all()
    assert gradient.norm() > 1e-3
    assert frechet_distance(x, y - n / 2 * gradient) < 0.5 * value


def test_identical_sets_have_no_distance(samples):
    x, _ = samples(40, 40, 12)
    value, gradient, _ = _value_and_gradients(x, x.clone())
    assert 0 <= float(value) < 1e-13
    assert gradient.abs().max() < 1e-13


def test_huge_mean_costs_nothing(samples):
    x, y = samples(64, 64, 8)
    shift = 2.0**27
    assert_close("value", frechet_distance(x, y), frechet_distance(x + shift, y + shift), 1e-7)


def test_invariances(samples):
    x, y = samples(30, 40, 10)
    value = frechet_distance(x, y)
    rotation = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64))[0]
    assert_close("rotation", value, frechet_distance(x @ rotation, y @ rotation), 1e-12)
    assert_close("permutation", value, frechet_distance(x.flip(0), y.flip(0)), 1e-12)
    assert_close("symmetry", value, frechet_distance(y, x), 1e-12)
    _, _, gradient = _value_and_gradients(x, y)
    for scale in (1e-140, 3.0, 1e140):
        scaled, _, moved = _value_and_gradients(x * scale, y * scale)
        assert_close("scale", value, scaled / scale / scale, 1e-12)
        assert_close("scale of the gradient", gradient, moved / scale, 1e-9)
    assert_close("translation", value, frechet_distance(x + 5, y + 5), 1e-11)
    tiny, _, moved = _value_and_gradients(x * 1e-200, y * 1e-200)  # the value itself is below every float64
    assert float(tiny) == 0
    assert_close("tiny", gradient, moved * 1e200, 1e-9)


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(1, 5), st.data())
def test_never_complex_nan_or_negative(n, m, d, data):
    numbers = st.sampled_from([0.0, 1.0, -1.0, 1e-160, 1e150, 1e-8, 1 / 3])
    x = torch.from_numpy(data.draw(hnp.arrays("float64", (n, d), elements=numbers)))
    y = torch.from_numpy(data.draw(hnp.arrays("float64", (m, d), elements=numbers)))
    bounded = x.clamp(-1e6, 1e6), y.clamp(-1e6, 1e6)  # these form covariances, whose entries are squares
    for method in ("auto", "svd", "polar", "eigh"):
        found = _value_and_gradients(*(bounded if method == "eigh" else (x, y)), method=method)
        assert float(found[0]) >= 0
        for part in found:
            assert torch.isfinite(part).all()
    distance = float(frechet_distance(*(FeatureStats.from_features(t) for t in bounded)))
    assert distance >= 0
    assert math.isfinite(distance)


def test_one_outlier_stays_finite(samples):
    x, y = samples(20, 20, 40)
    y[3] = 1e9
    value, _, gradient = _value_and_gradients(x, y)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_gaussian_map_carries_one_covariance_to_the_other(samples):
    x, y = samples(50, 60, 6)
    moments = (x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    transport = gaussian_map(*moments)
    assert_close("push forward", torch.cov(y.T), transport.matrix @ torch.cov(x.T) @ transport.matrix, 1e-10)
    assert_close("mean", y.mean(0), transport(x).mean(0), 1e-12)
    assert_close("distance", frechet_distance_from_moments(*moments), transport.distance, 1e-10)
    assert_close("symmetric", transport.matrix, transport.matrix.mT, 1e-15)


def test_rank_deficient_covariance(samples):
    x, y = samples(5, 200, 12)
    stats = [FeatureStats.from_features(t) for t in (x, y)]
    assert_close("deficient", frechet_distance(x, y), frechet_distance(*stats), 1e-6)
    assert_close("deficient, swapped", frechet_distance(x, y), frechet_distance(*stats[::-1]), 1e-6)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), ValueError, r"x: expected at least two samples.*\(1, 3\)"),
        (torch.zeros(4, 3), torch.zeros(4, 2), ValueError, "y: expected features of width 3.*got 2"),
        (torch.zeros(4, 3), torch.full((4, 3), math.nan), ValueError, "y: expected finite.*12 NaN"),
        (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3), TypeError, "x: expected floating"),
        (torch.zeros(4), torch.zeros(4, 3), ValueError, "x: expected 2 dim"),
        ([[1.0]], torch.zeros(4, 3), TypeError, "x: expected a torch.Tensor, got list"),
    ],
)
def test_bad_input_names_the_argument(x, y, error, message):
    with pytest.raises(error, match=message):
        frechet_distance(x, y)
    with pytest.raises(ValueError, match="method: expected one of"):
        frechet_distance(torch.zeros(3, 3), torch.zeros(3, 3), method="sqrtm")
