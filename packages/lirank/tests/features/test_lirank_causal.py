import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lirank.features.causal import CausalFeatures
from lirank.features.history import HistoryState
from lirank.features.popularity import PopularityState, linear_recurrence
from lirank.features.prepare import load_causal, save_causal
from lirank.schema.features import History, Popularity

EVENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 1)), min_size=1, max_size=40)
PLAIN = {"name": "p", "key": ("k",), "label": "y", "prior": 0.3, "strength": 4.0}


def pieces(events, cuts):
    ends = sorted({0, len(events), *(c % (len(events) + 1) for c in cuts)})
    return [events[a:b] for a, b in itertools.pairwise(ends)]


def columns(events):
    return tuple(np.array(c, dtype=np.int64).reshape(-1) for c in zip(*events, strict=True))


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.lists(st.integers(0, 40)), st.sampled_from([0.0, 3.0]), st.sampled_from([0, 1, 4]))
def test_popularity_is_the_sum_over_strictly_earlier_events(events, cuts, half_life, delay):
    events = sorted(events, key=lambda e: e[1])
    state = PopularityState(Popularity(**PLAIN, half_life=half_life, delay=float(delay)), 1.0)
    found = []
    for piece in pieces(events, cuts):
        keys, times, labels = columns(piece)
        found.append(state.scan(keys, times, labels.astype(float)))
    for (key, time, _), (rate, log_count) in zip(events, np.concatenate(found), strict=True):
        earlier = [(t + delay, y) for k, t, y in events if k == key and t + delay < time]
        fade = [0.5 ** ((time - t) / half_life) if half_life else 1.0 for t, _ in earlier]
        n, c = sum(fade), sum(f * y for f, (_, y) in zip(fade, earlier, strict=True))
        assert rate == pytest.approx((c + 4 * 0.3) / (n + 4), abs=1e-9)
        assert log_count == pytest.approx(np.log1p(n), abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.lists(st.integers(0, 40)), st.integers(1, 4), st.sampled_from([0, 2]))
def test_history_is_the_last_strictly_earlier_events(events, cuts, length, delay):
    events = sorted(events, key=lambda e: e[1])
    state = HistoryState(History(name="h", key="k", item="i", length=length, action="y", delay=float(delay)), 1.0)
    items, actions = [], []
    for number, piece in zip(np.cumsum([0, *map(len, pieces(events, cuts))]), pieces(events, cuts), strict=False):
        keys, times, labels = columns(piece)
        found, offsets, acts = state.scan(keys, times, np.arange(number, number + len(piece)), labels.astype(float))
        items += [found[a:b].tolist() for a, b in itertools.pairwise(offsets)]
        actions += [acts[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    for (key, time, _), seen, acts in zip(events, items, actions, strict=True):
        earlier = [i for i, (k, t, _) in enumerate(events) if k == key and t + delay < time][-length:]
        assert seen == earlier
        assert acts == [events[i][2] for i in earlier]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.floats(-5, 5)), max_size=30))
def test_recurrence(pairs):
    a, b = np.array([p[0] for p in pairs])[:, None], np.array([p[1] for p in pairs])[:, None]
    x, expected = 0.0, []
    for factor, term in pairs:
        x = factor * x + term
        expected.append(x)
    found = linear_recurrence(a.reshape(-1, 1), b.reshape(-1, 1))[:, 0]
    assert np.allclose(found, expected)


def test_a_lookup_equals_the_scan_and_remembers_nothing(schema, table):
    whole = CausalFeatures(schema, 1.0)
    expected = whole.extend(table)
    online = CausalFeatures(schema, 1.0)
    for row in range(300):
        request = table.slice(row, 1)
        for _ in range(2):
            found = online.lookup(request.drop_columns(["click", "like", "position"]))
        for name in ("item_rate.rate", "pair_rate.log_count", "seen", "seen.action"):
            assert found[name].to_pylist() == expected[name].slice(row, 1).to_pylist() or found[name].to_pylist()[
                0
            ] == pytest.approx(expected[name][row].as_py(), abs=1e-12)
        online.observe(request)


def test_time_may_not_run_backwards(schema, table):  # metarank#551: aggregates that know the future
    causal = CausalFeatures(schema, 1.0)
    causal.extend(table.slice(700))
    with pytest.raises(ValueError, match="earlier than events"):
        causal.extend(table.slice(0, 700))
    with pytest.raises(ValueError, match="earlier than events"):
        causal.lookup(table.slice(0, 1))


def test_memory_round_trip(schema, table, tmp_path):
    first = CausalFeatures(schema, 1.0)
    first.extend(table.slice(0, 800))
    save_causal(first, tmp_path / "c.safetensors")
    second = load_causal(tmp_path / "c.safetensors")
    assert second.extend(table.slice(800)).equals(first.extend(table.slice(800)))


def test_a_click_that_arrives_later_is_not_known_before(schema):  # mwt-ds#90
    state = PopularityState(Popularity(**PLAIN, delay=100.0), 1.0)
    key = np.array([1])
    state.scan(key, np.array([0]), np.array([1.0]))
    assert state.lookup(key, np.array([100]))[0, 1] == 0.0
    assert state.lookup(key, np.array([101]))[0, 1] > 0.0


def test_a_row_without_a_label_is_not_counted():
    state = PopularityState(Popularity(**PLAIN), 1.0)
    state.scan(np.array([1, 1]), np.array([0, 1]), np.array([np.nan, 1.0]))
    assert state.lookup(np.array([1]), np.array([5]))[0, 1] == pytest.approx(np.log(2))


def test_delays_and_half_lives_are_seconds_whatever_the_unit():
    for seconds, unit in ((1.0, 1), (1e-3, 1000)):
        state = PopularityState(Popularity(**PLAIN, half_life=10.0, delay=5.0), seconds)
        state.scan(np.array([1]), np.array([0]), np.array([1.0]))
        found = state.lookup(np.array([1]), np.array([15 * unit]))[0, 1]
        assert found == pytest.approx(np.log1p(0.5))


def test_lists_come_back_as_arrow(schema, table):
    found = CausalFeatures(schema, 1.0).extend(table)
    assert found["seen"].type == pa.large_list(pa.int64())
    assert max(map(len, found["seen"].to_pylist())) == 5
