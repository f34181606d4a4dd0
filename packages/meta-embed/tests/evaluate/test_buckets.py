import numpy as np
import pytest
from meta_embed.evaluate.buckets import by_activity, by_size, finite, last_events, model_scores
from meta_embed.evaluate.metrics import Scores, auc
from meta_embed.tasks.split import split_at


def _truth(events):
    """A predictor that knows the labels."""

    def predict(split):
        rows = np.concatenate([np.arange(a, a + n) for a, n in zip(split.query_start, split.query, strict=True)])
        return Scores(2 * events.y[rows] - 1, events.y[rows], np.repeat(split.members, split.query))

    return predict


def test_every_member_is_in_the_bucket_of_its_activity(trained):
    events, query = trained.events, 5
    rows = by_activity(events, query, 8, {"truth": _truth(events)})
    before = events.counts - np.minimum(events.counts, query)
    expected = {
        "0": (before == 0).sum(),
        "1-4": ((before >= 1) & (before <= 4)).sum(),
        "5-16": ((before >= 5) & (before <= 16)).sum(),
        "17-64": ((before >= 17) & (before <= 64)).sum(),
        ">64": (before > 64).sum(),
    }
    assert {row["activity"]: row["members"] for row in rows} == {k: n for k, n in expected.items() if n}
    assert sum(row["rows"] for row in rows) == np.minimum(events.counts, query).sum()
    assert all(row["truth_auc"] == row["truth_member_auc"] == 1.0 for row in rows)


def test_last_events_ask_of_the_end_and_know_what_came_before(trained):
    events = trained.events
    split = last_events(events, 5, 8)
    assert np.array_equal(split.query_start + split.query, events.offsets[1:])
    assert np.array_equal(split.support_start + split.support, split.query_start)
    assert split.support.max() == 8


def test_support_sizes_share_their_queries(trained):
    events, model = trained.events, trained.model()
    rows = by_size(events, (0, 4), 5, 4, {"model": lambda split: model_scores(model, events, split)})
    assert [row["support"] for row in rows] == [0, 4]
    for row in rows:
        scores = model_scores(model, events, split_at(events, row["support"], 5, start=4))
        assert row["model_auc"] == auc(scores.logit, scores.y)
    cold = model_scores(model, events, split_at(events, 4, 5, start=4), adapted=False)
    assert rows[0]["model_auc"] == auc(cold.logit, cold.y)


def test_what_does_not_exist_is_null():
    assert finite([{"a": float("nan"), "b": 1.0, "c": "x"}]) == [{"a": None, "b": 1.0, "c": "x"}]


def test_gains_come_with_their_interval(trained):
    events, model = trained.events, trained.model()

    def cold(split):
        return model_scores(model, events, split, adapted=False)

    predictors = {"none": cold, "truth": _truth(events)}
    for rows in (by_size(events, (4,), 5, 4, predictors, "truth"), by_activity(events, 5, 8, predictors, "truth")):
        for row in rows:
            assert row["truth_over_none"] == pytest.approx(1.0 - row["none_auc"], abs=1e-12)
            assert row["truth_over_none_low"] <= row["truth_over_none"] <= row["truth_over_none_high"] <= 1.0
            assert "none_over_truth" not in row
