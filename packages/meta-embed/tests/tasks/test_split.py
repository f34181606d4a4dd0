import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_embed.tasks.encode import build_vocabulary
from meta_embed.tasks.episodes import EpisodeOptions, draw, epoch
from meta_embed.tasks.events import build_events
from meta_embed.tasks.schema import Feature, Schema
from meta_embed.tasks.split import Split, by_key, check_split, split_at


def _log(counts, delay=0.0, seed=0):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(counts)), counts)
    time = rng.integers(0, 30, len(owner)).astype(float)  # ties on purpose
    table = pa.table(
        {"user": owner, "at": time, "seen": time + delay * rng.random(len(owner)),
         "y": rng.integers(0, 2, len(owner)) * 1.0, "item": rng.integers(0, 5, len(owner)), "n": np.arange(len(owner))}
    )  # fmt: skip
    schema = Schema(entity="user", time="at", label="y", known="seen", row=(Feature("item"),), event="n")
    return build_events(table, schema, build_vocabulary(table, schema))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 6), st.integers(1, 9), st.floats(0, 1),
    st.floats(0, 40), st.integers(0, 99),
)  # fmt: skip
def test_no_episode_leaks(counts, support, query, cold, delay, seed):
    log = _log(counts, delay, seed)
    options = EpisodeOptions(4, support, query, cold)
    split = draw(log, np.arange(len(log)), options, np.random.default_rng(seed))
    assert len(split.members) == len(log)
    for t, member in enumerate(split.members):
        s = slice(split.support_start[t], split.support_start[t] + split.support[t])
        q = slice(split.query_start[t], split.query_start[t] + split.query[t])
        assert log.offsets[member] <= s.start <= s.stop <= q.start < q.stop <= log.offsets[member + 1]
        assert split.support[t] <= support
        assert split.query[t] <= query
        assert (log.known[s] <= log.time[q.start]).all()  # no label that came after the question
        assert (log.time[s] <= log.time[q].min()).all()


def test_a_label_known_only_after_the_query_is_not_in_the_support():
    table = pa.table(
        {"user": [1] * 4, "at": [1.0, 2, 3, 4], "seen": [1.0, 9, 3, 4], "y": [1.0, 1, 0, 1], "item": [1, 2, 3, 4]}
    )
    schema = Schema(entity="user", time="at", label="y", known="seen", row=(Feature("item"),))
    log = build_events(table, schema, build_vocabulary(table, schema))
    assert split_at(log, 3, 1).support.tolist() == [1]
    backwards = table.set_column(2, "seen", pa.array([0.0, 2, 3, 4]))
    with pytest.raises(ValueError, match="seen: expected labels known at or after their event"):
        build_events(backwards, schema, build_vocabulary(backwards, schema))


def test_support_after_the_query_and_empty_queries_are_refused():
    log = _log([6, 6])
    good = split_at(log, 2, 3)
    with pytest.raises(ValueError, match="support: expected events before those of the query"):
        check_split(log, dataclasses.replace(good, support_start=good.query_start + 1, query_start=good.support_start))
    with pytest.raises(ValueError, match="query: expected at least one event"):
        check_split(log, dataclasses.replace(good, query=good.query * 0))
    with pytest.raises(ValueError, match="within the events of their member"):
        check_split(log, Split(good.members, good.support_start, good.support + 9, good.query_start, good.query))
    with pytest.raises(ValueError, match="query: empty"):
        split_at(log, 6, 3)
    with pytest.raises(ValueError, match="support: expected 0 <= support <= start"):
        split_at(log, 5, 3, start=4)


def test_every_size_asks_the_same_query():
    log = _log([9, 12, 3])
    splits = [split_at(log, n, 4, start=4) for n in (0, 2, 4)]
    assert all(np.array_equal(s.query_start, splits[0].query_start) for s in splits)
    assert splits[0].members.tolist() == [0, 1]
    assert [s.support.tolist() for s in splits] == [[0, 0], [2, 2], [4, 4]]


def test_the_share_of_cold_episodes():
    log = _log([20] * 4000)
    split = draw(log, np.arange(4000), EpisodeOptions(64, 8, 4, 0.3), np.random.default_rng(0))
    assert abs((split.support == 0).mean() - 0.3) < 0.03
    none = draw(log, np.arange(4000), EpisodeOptions(64, 8, 4, 0.0), np.random.default_rng(0))
    assert none.support.min() >= 1
    assert none.support.max() == 8


@pytest.mark.parametrize(("weighting", "power"), [("events", 1.0), ("sqrt", 0.5), ("tasks", 0.0)])
def test_what_a_task_counts(weighting, power):
    log = _log([2, 9, 20, 5])
    options = EpisodeOptions(3, 3, 40, 0.5, weighting)
    for batch, weight in epoch(log, options, np.random.default_rng(1)):
        lengths = batch.query.lengths.double()
        counted = [float(w.sum()) for w in batch.query.w.double().split(batch.query.lengths.tolist())]
        assert counted == pytest.approx((lengths**power).tolist(), rel=1e-6)
        assert weight == pytest.approx(sum(counted), rel=1e-6)
    weightless = dataclasses.replace(log, w=np.zeros_like(log.w))
    assert not list(epoch(weightless, options, np.random.default_rng(1)))


def test_ranks_share_the_tasks_of_every_batch():
    log = _log([9] * 11)
    options = EpisodeOptions(4, 3, 3, 0.2)
    whole = list(epoch(log, options, np.random.default_rng(5)))
    halves = [list(epoch(log, options, np.random.default_rng(5), rank, 2)) for rank in (0, 1)]
    for (batch, weight), (one, w1), (two, w2) in zip(whole, *halves, strict=True):
        assert weight == w1 == w2
        assert len(one) + len(two) == len(batch)
        assert batch.query.ids.tolist() == one.query.ids.tolist() + two.query.ids.tolist()
        assert weight == float(batch.query.w.sum())


def test_parts_of_members_do_not_depend_on_who_else_is_there():
    few, many = np.arange(50), np.arange(500)
    parts, larger = by_key(few, (0.2, 0.3), 7), by_key(many, (0.2, 0.3), 7)
    for part, other in zip(parts, larger, strict=True):
        assert few[part].tolist() == [k for k in many[other].tolist() if k < 50]
    assert sorted(np.concatenate(parts).tolist()) == few.tolist()
