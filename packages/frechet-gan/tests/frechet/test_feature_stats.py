import numpy as np
import pytest
import torch
from core_tensor.dev.testing import assert_close, run_ranks
from frechet_gan import FeatureStats, frechet_distance
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.floats(0, 1e6), st.integers(0, 99))
def test_any_split_equals_one_pass(sizes, mean, seed):
    sizes = [2, *sizes]
    x = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean
    stats, other = FeatureStats(4), FeatureStats(4)
    for i, part in enumerate(x.split(sizes)):
        (stats if i % 2 else other).update(part)
    stats.merge(other)
    assert stats.count == x.shape[0]
    assert_close("mean", x.mean(0), stats.mean, 1e-13)
    assert_close("covariance", torch.cov(x.T), stats.covariance(), 1e-8)


def test_large_mean_in_float32_keeps_its_digits():
    x = torch.randn(500, 6, dtype=torch.float64) + 100
    single = x.float()
    stats = FeatureStats(6)
    for part in single.split(70):
        stats.update(part)
    assert_close("covariance", torch.cov(single.double().T), stats.covariance(), 1e-12)


def test_npz_round_trip_and_pytorch_fid_layout(tmp_path):
    x = torch.randn(50, 5)
    stats = FeatureStats.from_features(x)
    stats.save(tmp_path / "a.npz")
    back = FeatureStats.load(tmp_path / "a.npz")
    assert back.count == 50
    assert_close("covariance", stats.covariance(), back.covariance(), 1e-15)
    features = x.numpy()
    np.savez(tmp_path / "fid.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    foreign = FeatureStats.load(tmp_path / "fid.npz")
    assert float(frechet_distance(foreign, stats)) < 1e-6
    with pytest.raises(ValueError, match="does not say how many samples"):
        foreign.update(x)
    with pytest.raises(ValueError, match="does not say how many samples"):
        stats.merge(foreign)
    assert FeatureStats.load(tmp_path / "fid.npz", count=50).merge(stats).count == 100


def test_sums_of_torchmetrics():
    x = torch.randn(40, 3, dtype=torch.float64) + 2
    stats = FeatureStats.from_sums(x.sum(0), x.T @ x, 40)
    assert_close("covariance", torch.cov(x.T), stats.covariance(), 1e-12)
    total, outer, count = stats.to_sums()
    assert count == 40
    assert_close("sum", x.sum(0), total, 1e-14)
    assert_close("outer", x.T @ x, outer, 1e-14)


def test_states_of_torchmetrics_give_its_distance():
    image = pytest.importorskip("torchmetrics.image.fid")
    encoder = torch.nn.Flatten()
    encoder.num_features = 12
    metric = image.FrechetInceptionDistance(encoder, normalize=True, input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    images = torch.rand(2, 60, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for side, real in zip(images, (True, False), strict=True):
        metric.update(side, real=real)
    sides = [
        FeatureStats.from_sums(
            *(getattr(metric, f"{side}_features_{name}") for name in ("sum", "cov_sum", "num_samples"))
        )
        for side in ("real", "fake")
    ]
    assert float(frechet_distance(*sides)) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_squares_out_of_range_are_refused():
    with pytest.raises(ValueError, match="features: expected entries below 1e150"):
        FeatureStats.from_features(torch.tensor([[1e200], [0.0]], dtype=torch.float64))


def test_from_loader_checks_the_encoder():
    images = torch.randn(6, 1, 4, 4)
    stats = FeatureStats.from_loader(lambda i: i.flatten(1), images.split(4))
    assert (stats.count, stats.dim) == (6, 16)
    with pytest.raises(ValueError, match=r"encoder\(images\): expected shape \(4, any\)"):
        FeatureStats.from_loader(lambda i: i, images.split(4))
    with pytest.raises(ValueError, match="batches: expected at least one"):
        FeatureStats.from_loader(lambda i: i, [])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": np.zeros((3, 3))}, "no array mu, sigma; it has features"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"expected floating mu \(d,\) and sigma \(d, d\)"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [0.0, 1.0]])}, "symmetric"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "finite"),
        ({"mu": np.array(["a"], dtype=object), "sigma": np.eye(1)}, "expected an npz file"),
    ],
)
def test_foreign_npz_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        FeatureStats.load(tmp_path / "x.npz")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(ValueError, match="expected an npz file"):
        FeatureStats.load(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError):
        FeatureStats.load(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"ending in \.npz"):
        FeatureStats.from_features(torch.randn(4, 2)).save(tmp_path / "x.npy")


def test_bad_features():
    stats = FeatureStats(3)
    with pytest.raises(ValueError, match=r"features: expected shape \(any, 3\)"):
        stats.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="features: expected finite"):
        stats.update(torch.tensor([[0.0, 1.0, float("inf")]]))
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        stats.update(torch.zeros(1, 3)).covariance()
    with pytest.raises(ValueError, match="other: expected statistics of width 3, got 2"):
        stats.merge(FeatureStats(2))


def _rank_stats(rank, world_size, x):
    parts = x.split([3, x.shape[0] - 3])
    stats = FeatureStats.from_features(parts[rank]).all_reduce()
    return stats.count, stats.mean, stats.scatter


@pytest.mark.slow
@pytest.mark.distributed
def test_all_reduce_equals_one_process():
    x = torch.randn(20, 4, dtype=torch.float64) + 50
    whole = FeatureStats.from_features(x)
    for count, mean, scatter in run_ranks(_rank_stats, 2, x):
        assert count == 20
        assert_close("mean", whole.mean, mean, 1e-14)
        assert_close("scatter", whole.scatter, scatter, 1e-12)
