import numpy as np
import pyarrow as pa
import pytest
from lirank.evidence.generator import FEED, generate
from lirank.evidence.recipes import RECIPES, final_score, run_recipe, value_share, with_long_dwell
from lirank.train.loop import TrainConfig

SHORT = TrainConfig(epochs=1, batch_size=256)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_end_to_end(name, tmp_path):
    found = run_recipe(name, tmp_path, events=20_000 if name == "ads" else 6000, training=SHORT)
    assert found["rows"]["test"] > 100
    assert all(0 < entry["logloss"] < 1.5 for entry in found["test"].values())
    if name == "feed":
        assert set(found["test"]) == {"click", "long_dwell", "like", "comment", "share"}
        assert -1 <= found["value_share_weighted_sum"] <= 1
    elif name == "jobs":
        assert set(found["auc_by_surface"]) == {"recommendation", "search"}
        assert 0 <= found["new_jobs_share"] < 1
    else:
        explored = found["exploration"]
        assert explored["requests"] > 20
        assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in explored["greedy_estimated"].values())


def test_long_dwell_uses_the_days_before_only():
    made = generate(FEED)
    log, schema = with_long_dwell(made.log, made.schema)
    label, day = log["long_dwell"], (log["time"].to_numpy() - log["time"][0].as_py()) // 86_400
    assert label.is_null().to_numpy()[day == 0].all()
    assert label.null_count == (day == 0).sum()
    late = label.to_numpy(zero_copy_only=False)[day > 10]
    assert late.mean() == pytest.approx(0.1, abs=0.01)
    # the last day cannot change the labels of the days before
    cut = made.log.filter(pa.array(day < day.max()))
    assert with_long_dwell(cut, made.schema)[0]["long_dwell"].equals(label.slice(0, cut.num_rows))
    assert [x.group for x in schema.labels] == ["click", "click", "contribution", "contribution", "contribution"]


def test_a_final_score_is_a_weighted_sum():
    p = {"a": np.array([0.1, 0.2]), "b": np.array([0.5, 0.0])}
    np.testing.assert_allclose(final_score(p, {"a": 1.0, "b": 2.0}), [1.1, 0.2])
    with pytest.raises(ValueError, match="weights: expected a, b, got a"):
        final_score(p, {"a": 1.0})


def test_value_share_runs_from_a_random_row_to_the_best():
    gain, groups = np.array([1.0, 0.0, 3.0, 5.0, 7.0]), np.array([1, 1, 2, 2, 3])
    assert value_share(gain, gain, groups) == 1
    assert value_share(-gain, gain, groups) == -1
    assert value_share(np.array([1.0, 0.0, 2.0, 1.0, 0.0]), gain, groups) == pytest.approx((0.5 - 1.0) / (0.5 + 1.0))
    assert np.isnan(value_share(gain, np.ones(5), groups))
