import math

import numpy as np
import pyarrow as pa
import pytest
from lirank.features.dwell import DwellLabeler

KEYS = ("device", "position")


def _rows(n=40_000, seed=0):
    generator = np.random.default_rng(seed)
    device, position = generator.integers(3, size=n), generator.integers(4, size=n)
    dwell = np.exp(1.0 + device - 0.5 * position + generator.normal(size=n))
    names = np.array(["android", "ios", None], dtype=object)
    return pa.table({"device": pa.array(names[device]), "position": position, "dwell": dwell})


def _counted(rows, **options):
    labeler = DwellLabeler(KEYS, **options)
    labeler.add(rows)
    return labeler


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9, 0.99])
def test_thresholds_are_the_quantiles_of_their_contexts_within_a_hundredth_of_rank(quantile):
    rows = _rows()
    labeler = _counted(rows, quantile=quantile)
    for device in ("android", "ios", None):
        for position in range(4):
            chosen = [
                d for d, p, x in zip(*(rows[c].to_pylist() for c in ("dwell", "position", "device")), strict=True)
                if p == position and x == device
            ]  # fmt: skip
            below = np.mean(np.array(chosen) <= labeler.threshold((device, position)))
            assert below == pytest.approx(quantile, abs=0.01)


def test_labels_are_equally_frequent_in_all_contexts():
    rows = _rows()
    label = _counted(rows, quantile=0.8).label(rows)
    share = pa.table({"k": rows["position"], "y": label}).group_by("k").aggregate([("y", "mean")])["y_mean"].to_numpy()
    np.testing.assert_allclose(share, 0.2, atol=0.01)
    raw = (rows["dwell"].to_numpy() > np.quantile(rows["dwell"].to_numpy(), 0.8)).astype(float)
    assert raw[rows["position"].to_numpy() == 0].mean() > 2 * raw[rows["position"].to_numpy() == 3].mean()


def test_parts_add_up_to_the_whole():
    rows = _rows(5000)
    whole, merged = _counted(rows), _counted(rows.slice(0, 1234))
    merged.merge(_counted(rows.slice(1234)))
    assert whole.counts.keys() == merged.counts.keys()
    assert all(np.array_equal(whole.counts[c], merged.counts[c]) for c in whole.counts)
    encoded = rows.set_column(0, "device", rows["device"].dictionary_encode())
    assert _counted(encoded).counts.keys() == whole.counts.keys()


def test_rare_contexts_fall_back_to_coarser_ones():
    rows = pa.table(
        {"device": ["a"] * 200 + ["b"] * 3, "position": [0] * 200 + [7] * 3, "dwell": [2.0] * 200 + [50.0] * 3}
    )
    labeler = _counted(rows, least=100)
    assert labeler.threshold(("a", 9)) == labeler.threshold(("a", 0)) == pytest.approx(2, rel=0.02)
    assert labeler.threshold(("b", 7)) == labeler.threshold(("new", 1)) == labeler.threshold(())


def test_fading_follows_a_habit_that_changes():
    labeler = DwellLabeler((), quantile=0.5)
    for day in range(30):
        labeler.fade(0.7)
        labeler.add(pa.table({"dwell": np.full(500, 1.0 if day < 15 else 10.0)}))
    assert labeler.threshold(()) == pytest.approx(10, rel=0.02)
    for _ in range(60):
        labeler.fade(0.5)
    assert not labeler.counts


def test_saved_and_loaded(tmp_path):
    rows = _rows(2000)
    labeler = _counted(rows)
    labeler.save(tmp_path / "d.safetensors")
    found = DwellLabeler.load(tmp_path / "d.safetensors")
    assert found.label(rows).equals(labeler.label(rows))
    raw = (tmp_path / "d.safetensors").read_bytes()
    for broken in (b"", raw[:-5], raw.replace(b'"quantile\\": 0.9', b'"quantile\\": 9.9')):
        (tmp_path / "d.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match=r"d\.safetensors: expected a dwell labeler"):
            DwellLabeler.load(tmp_path / "d.safetensors")


def test_unknown_times_have_no_label():
    rows = pa.table({"device": ["a", "a"], "position": [0, 0], "dwell": pa.array([1.0, None])})
    labeler = _counted(rows, least=1)
    assert labeler.counts[("a", 0)].sum() == 1
    assert labeler.label(rows).null_count == 1
    empty = rows.slice(0, 0)
    labeler.add(empty)
    assert len(labeler.label(empty)) == 0


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_times_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="dwell: expected seconds"):
        _counted(pa.table({"device": ["a"], "position": [0], "dwell": [bad]}))


def test_what_cannot_be_labeled_is_refused():
    with pytest.raises(ValueError, match="position: the rows have no such column"):
        _counted(pa.table({"device": ["a"], "dwell": [1.0]}))
    with pytest.raises(ValueError, match="rows to be added"):
        DwellLabeler(KEYS).label(_rows(10))
    with pytest.raises(ValueError, match="expected the keys device, position"):
        DwellLabeler(KEYS).merge(DwellLabeler(("device",)))
    with pytest.raises(ValueError, match="quantile"):
        DwellLabeler(KEYS, quantile=1.0)
