"""The last events of a key from strictly earlier rows; a block of a log and a single request share the code."""

from collections.abc import Mapping

import numpy as np

from lirank.schema.features import History

_UNKNOWN = 2
"""Action of an event whose label is not known."""


class HistoryState:
    """Remembered events of every key of one feature.

    Args:
        feature: The feature.
        seconds: Seconds per unit of the times.
    """

    def __init__(self, feature: History, seconds: float) -> None:
        self.feature = feature
        self._delay = round(feature.delay / seconds)
        self._events: dict[int, np.ndarray] = {}  # key -> (m, 3): time from which it is visible, item, action
        self._now = np.iinfo(np.int64).min

    def lookup(self, keys: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Histories at some times, without remembering anything.

        Args:
            keys: Fingerprints, shape (n,).
            times: Times of the queries, shape (n,).

        Returns:
            Items of all histories, oldest first (m,), where each begins and the last ends (n + 1,), and actions (m,).

        Raises:
            ValueError: If a query is older than the last block that was remembered.
        """
        return self._run(keys, times, None, None)

    def scan(
        self, keys: np.ndarray, times: np.ndarray, items: np.ndarray, labels: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Histories of every event of a block, each from strictly earlier events; then remember the block.

        Args:
            keys: Fingerprints, shape (n,).
            times: Event times, shape (n,), none before the block before.
            items: What is remembered, shape (n,).
            labels: What came of it, shape (n,), NaN where unknown; None without actions.

        Returns:
            As `lookup`.

        Raises:
            ValueError: If an event is older than the previous block.
        """
        return self._run(keys, times, items, labels)

    def _run(
        self, keys: np.ndarray, times: np.ndarray, items: np.ndarray | None, labels: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if len(keys) == 0:
            return np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64)
        if times.min() < self._now:
            raise ValueError(f"{self.feature.name}: a time is earlier than events that are already remembered")
        # 1. all events of these keys, in order of key and time; later events of a block come last
        unique, slot = np.unique(keys, return_inverse=True)
        past = [self._events.get(key, _NONE) for key in unique.tolist()]
        owner = np.repeat(np.arange(len(unique)), [len(events) for events in past])
        events = np.concatenate(past)
        if items is not None:
            action = np.full(len(items), _UNKNOWN) if labels is None else np.where(np.isnan(labels), _UNKNOWN, labels)
            block = np.stack([times + self._delay, items, action.astype(np.int64)], 1)
            owner, events = np.concatenate([owner, slot]), np.concatenate([events, block])
        order = np.lexsort((events[:, 0], owner))
        owner, events = owner[order], events[order]
        # 2. how many events precede each query
        joint_slot, joint_time = np.concatenate([slot, owner]), np.concatenate([times, events[:, 0]])
        is_event = np.repeat([False, True], [len(keys), len(events)])
        place = np.lexsort((is_event, joint_time, joint_slot))  # a query comes before the events at the same time
        before = np.empty(len(place), np.int64)
        before[place] = np.cumsum(is_event[place]) - is_event[place]
        end = before[: len(keys)]
        first = np.searchsorted(owner, slot)
        length = np.minimum(end - first, self.feature.length)
        # 3. the last of them
        offsets = np.concatenate([[0], length.cumsum()])
        index = np.repeat(end - length - offsets[:-1], length) + np.arange(offsets[-1])
        if items is not None:
            self._remember(unique, owner, events, int(times.max()))
        return events[index, 1], offsets, events[index, 2]

    def _remember(self, unique: np.ndarray, owner: np.ndarray, events: np.ndarray, now: int) -> None:
        bounds = np.searchsorted(owner, np.arange(len(unique) + 1))
        for i, key in enumerate(unique.tolist()):
            mine = events[bounds[i] : bounds[i + 1]]
            visible = int(np.searchsorted(mine[:, 0], now))  # strictly before `now`
            self._events[key] = mine[max(visible - self.feature.length, 0) :].copy()
        self._now = now

    def forget(self, before: int) -> int:
        """Forget keys whose last event is before a time; returns how many."""
        stale = [key for key, events in self._events.items() if events[-1, 0] - self._delay < before]
        for key in stale:
            del self._events[key]
        return len(stale)

    def state(self) -> dict[str, np.ndarray]:
        """Everything remembered, as arrays."""
        return {
            "keys": np.fromiter(self._events, np.int64, len(self._events)),
            "counts": np.array([len(events) for events in self._events.values()], np.int64),
            "events": np.concatenate([_NONE, *self._events.values()]),
            "now": np.array([self._now]),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        ends = state["counts"].cumsum()[:-1]
        pieces = np.split(state["events"].reshape(-1, 3), ends) if len(state["keys"]) else []
        self._events = {key: piece.copy() for key, piece in zip(state["keys"].tolist(), pieces, strict=True)}
        self._now = int(state["now"][0])


_NONE = np.zeros((0, 3), np.int64)
