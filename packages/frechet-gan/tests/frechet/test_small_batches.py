"""Rows of small batches wait and are absorbed together; nobody sees the difference."""

import copy

import pytest
import torch
from core_tensor.dev.testing import assert_close
from frechet_gan import FeatureStats, frechet_distance

ROWS = torch.randn(2600, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4


@pytest.mark.parametrize("batch", [1, 7, 64, 999, 1000, 2600])
def test_any_batch_gives_the_same_statistics(batch):
    stats = FeatureStats(5)
    for start, part in enumerate(ROWS.split(batch)):
        stats.update(part)
        assert stats.count == min((start + 1) * batch, 2600)  # also while rows wait
    assert_close("mean", ROWS.mean(0), stats.mean, 1e-14)
    assert_close("covariance", torch.cov(ROWS.T), stats.covariance(), 1e-11)


def test_a_batch_may_be_changed_after_it_was_given():
    stats, batch = FeatureStats(5), ROWS[:10].clone()
    stats.update(batch)
    batch.zero_()
    assert_close("mean", ROWS[:10].mean(0), stats.mean, 1e-14)


def test_every_use_sees_the_rows_that_wait(tmp_path):
    half, other = FeatureStats(5).update(ROWS[:20]), FeatureStats(5).update(ROWS[20:40])
    truth = FeatureStats.from_features(ROWS[:40])
    half.save(tmp_path / "half.npz")
    loaded = FeatureStats.load(tmp_path / "half.npz")
    for merged in (copy.deepcopy(half).merge(other), loaded.merge(other)):
        assert merged.count == 40
        assert_close("covariance", truth.covariance(), merged.covariance(), 1e-10)
    assert float(frechet_distance(half, half)) == pytest.approx(0, abs=1e-9)
    total, _, count = half.to_sums()
    assert count == 20
    assert_close("sum", ROWS[:20].sum(0), total, 1e-14)
    with pytest.raises(ValueError, match="entries below 1e150"):
        half.update(torch.full((2, 5), 1e200, dtype=torch.float64))
    assert half.count == 20
