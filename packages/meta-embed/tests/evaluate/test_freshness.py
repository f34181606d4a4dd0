import numpy as np
import pytest
from meta_embed.evaluate.freshness import by_period, refreshed
from meta_embed.evidence.generator import DAY


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


def test_fresher_vectors_know_more(trained):
    periods = {"never": float("inf"), "daily": DAY, "every event": 0.0}
    rows = by_period(trained.model(), trained.events, 4, 6, periods, 8)
    assert [row["refresh"] for row in rows] == list(periods)
    assert len({row["auc"] for row in rows}) == 3
