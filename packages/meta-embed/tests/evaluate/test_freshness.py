import numpy as np
import pytest
from meta_embed.evaluate.buckets import model_scores
from meta_embed.evaluate.freshness import freshness_scores, refreshed
from meta_embed.evidence.generator import DAY
from meta_embed.tasks.split import split_at


@pytest.mark.parametrize("period", [0.0, DAY / 24, DAY, 7 * DAY, float("inf")])
def test_a_support_is_what_the_last_refresh_knew(trained, period):
    events, start, query, support = trained.events, 4, 6, 5
    split = refreshed(events, start, query, period, support)
    assert len(split.members) == np.minimum(events.counts - start, query)[events.counts > start].sum()
    for task in range(0, len(split.members), 7):
        member, row = split.members[task], split.query_start[task]
        begin = events.offsets[member]
        first = events.time[begin + start]
        refresh = events.time[row] if period == 0 else first
        if 0 < period < np.inf:
            refresh = max(np.floor(events.time[row] / period) * period, first)
        known = [i for i in range(begin, row) if events.time[i] < refresh or i < begin + start][-support:]
        found = np.arange(split.support_start[task], split.support_start[task] + split.support[task])
        assert found.tolist() == known


def test_every_interval_scores_the_same_rows_with_other_vectors(trained):
    model, events = trained.model(), trained.events
    by_period = [freshness_scores(model, events, 4, 6, period, 8) for period in (float("inf"), DAY, 0.0)]
    for scores in by_period[1:]:
        np.testing.assert_array_equal(scores.y, by_period[0].y)
        np.testing.assert_array_equal(scores.owner, by_period[0].owner)
        assert (scores.logit != by_period[0].logit).any()
    # without a refresh, what came before the query is all there is
    stale = model_scores(model, events, split_at(events, 4, 6, start=4))
    np.testing.assert_allclose(by_period[0].logit, stale.logit, atol=1e-6)
