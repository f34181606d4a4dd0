r"""Counts over strictly earlier events: how often a key occurred, how often a label followed, decayed with time.

With events of a key at times $t_j$ (known from $t_j + delay$ on) and labels $y_j$,

$$ n(t) = \sum_{t_j + delay < t} 2^{-(t - t_j - delay)/h}, \quad c(t) = \sum_{t_j + delay < t} y_j 2^{-(\cdot)/h}, \quad
   rate = \frac{c + s \, p}{n + s} . $$

Events of equal time do not see one another. A block of a log and a single request go through the same function.
"""

from collections.abc import Mapping

import numpy as np

from lirank.schema.features import Popularity


class PopularityState:
    """Counts of every key of one feature.

    Args:
        feature: The feature.
        seconds: Seconds per unit of the times.
    """

    def __init__(self, feature: Popularity, seconds: float) -> None:
        self.feature = feature
        self._decay = np.log(2.0) * seconds / feature.half_life if feature.half_life else 0.0  # per unit of time
        self._delay = round(feature.delay / seconds)
        self._slots: dict[int, int] = {}
        self._last = np.zeros(0, np.int64)  # time of the last event counted
        self._sums = np.zeros((0, 2))  # count and labels, decayed to `last`
        self._pending = np.zeros((0, 2), np.int64)  # key and time of events that no query may see yet
        self._pending_labels = np.zeros(0)

    def lookup(self, keys: np.ndarray, times: np.ndarray) -> np.ndarray:
        """The feature at some times, without counting anything.

        Args:
            keys: Fingerprints, shape (n,).
            times: Times of the queries, shape (n,), none before an event that is already counted.

        Returns:
            Smoothed rate and log(1 + count), shape (n, 2).

        Raises:
            ValueError: If a query is older than an event that was already counted: its answer would know the future.
        """
        return self._run(keys, times, None)

    def scan(self, keys: np.ndarray, times: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The feature of every event of a block, each from strictly earlier events; then count the block.

        Args:
            keys: Fingerprints, shape (n,).
            times: Event times, shape (n,), none before the block before.
            labels: Labels, shape (n,), NaN where unknown: such an event is not counted.

        Returns:
            Smoothed rate and log(1 + count), shape (n, 2).

        Raises:
            ValueError: If an event is older than one that was already counted.
        """
        return self._run(keys, times, labels)

    def _run(self, keys: np.ndarray, times: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        if len(keys) == 0:
            return np.zeros((0, 2))
        # 1. one list of operations: queries, then the events that may become visible to them
        event_keys, event_times, event_labels = self._pending[:, 0], self._pending[:, 1], self._pending_labels
        if labels is not None:
            known = ~np.isnan(labels)
            event_keys = np.concatenate([event_keys, keys[known]])
            event_times = np.concatenate([event_times, times[known] + self._delay])
            event_labels = np.concatenate([event_labels, labels[known]])
        unique, slot = np.unique(np.concatenate([keys, event_keys]), return_inverse=True)
        stored, last, sums = self._stored(unique)
        time = np.concatenate([times, event_times])
        if (stored & (_first_times(slot, time, len(unique)) <= last)).any():
            raise ValueError(f"{self.feature.name}: a time is earlier than events that were already counted")
        event = np.repeat([False, True], [len(keys), len(event_keys)])
        gain = np.zeros((len(time), 2))
        gain[event, 0], gain[event, 1] = 1.0, event_labels
        order = np.lexsort((event, time, slot))  # a query comes before the events at the same time
        # 2. the sums after each operation: decayed from the one before, or from what is stored
        s, t, g = slot[order], time[order], gain[order]
        starts = np.concatenate([[True], s[1:] != s[:-1]])
        before = np.where(starts, np.where(stored[s], last[s], t), np.concatenate([t[:1], t[:-1]]))
        fade = np.exp(-self._decay * (t - before))[:, None]
        g = g + np.where(starts[:, None], sums[s] * fade, 0.0)
        running = linear_recurrence(np.where(starts[:, None], 0.0, fade), g)  # (operations, 2)
        found = np.empty((len(keys), 2))
        query = ~event[order]
        found[order[query]] = running[query]
        # 3. count what every later query may see; the rest waits
        if labels is not None:
            self._commit(unique, s, t, running, event[order], times.max())
            wait = event_times >= times.max()
            self._pending = np.stack([event_keys[wait], event_times[wait]], 1)
            self._pending_labels = event_labels[wait]
        n, c, f = found[:, 0], found[:, 1], self.feature
        return np.stack([(c + f.strength * f.prior) / (n + f.strength), np.log1p(n)], 1)

    def _stored(self, unique: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place = np.fromiter((self._slots.get(key, -1) for key in unique.tolist()), np.int64, len(unique))
        stored = place >= 0
        last, sums = np.zeros(len(unique), np.int64), np.zeros((len(unique), 2))
        last[stored], sums[stored] = self._last[place[stored]], self._sums[place[stored]]
        return stored, last, sums

    def _commit(
        self, unique: np.ndarray, s: np.ndarray, t: np.ndarray, running: np.ndarray, event: np.ndarray, end: int
    ) -> None:
        visible = np.flatnonzero(event & (t < end))
        ends = visible[np.concatenate([s[visible][1:] != s[visible][:-1], [True]])] if len(visible) else visible
        keys = unique[s[ends]].tolist()
        new = [key for key in keys if key not in self._slots]
        self._slots.update({key: len(self._last) + i for i, key in enumerate(new)})
        self._last = np.concatenate([self._last, np.zeros(len(new), np.int64)])
        self._sums = np.concatenate([self._sums, np.zeros((len(new), 2))])
        place = np.fromiter((self._slots[key] for key in keys), np.int64, len(keys))
        self._last[place], self._sums[place] = t[ends], running[ends]

    def forget(self, before: int) -> int:
        """Forget keys whose last event is before a time; returns how many."""
        waiting = set(self._pending[:, 0].tolist())
        kept = [k for k, i in self._slots.items() if k in waiting or self._last[i] - self._delay >= before]
        place = np.array([self._slots[key] for key in kept], np.int64)
        forgotten = len(self._slots) - len(kept)
        self._last, self._sums = self._last[place], self._sums[place]
        self._slots = {key: i for i, key in enumerate(kept)}
        return forgotten

    def state(self) -> dict[str, np.ndarray]:
        """Everything counted, as arrays."""
        return {
            "keys": np.fromiter(self._slots, np.int64, len(self._slots)),
            "last": self._last,
            "sums": self._sums,
            "pending": self._pending,
            "pending_labels": self._pending_labels,
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        self._slots = {key: i for i, key in enumerate(state["keys"].tolist())}
        self._last, self._sums = state["last"].copy(), state["sums"].reshape(-1, 2).copy()
        self._pending, self._pending_labels = state["pending"].reshape(-1, 2).copy(), state["pending_labels"].copy()


def _first_times(slot: np.ndarray, time: np.ndarray, count: int) -> np.ndarray:
    first = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(first, slot, time)
    return first


def linear_recurrence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x_i = a_i x_{i-1} + b_i along the first axis, x_{-1} = 0, by doubling, so log2(n) passes.

    Args:
        a: Factors, shape (n, 1).
        b: Terms, shape (n, k).

    Returns:
        x, shape (n, k).
    """
    a, x = a.copy(), b.copy()
    step = 1
    while step < len(a) and a[step:].any():
        x[step:] += a[step:] * x[:-step].copy()
        a[step:] *= a[:-step].copy()
        a[:step] = 0.0
        step *= 2
    return x
