"""All causal features of a schema: columns added to a log in time order, and to requests from the same state."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from lirank.data.batch import label_values
from lirank.features.history import HistoryState
from lirank.features.popularity import PopularityState
from lirank.schema.columns import as_times, column_of
from lirank.schema.features import History, Popularity, Schema, column
from lirank.schema.hashing import combined, fingerprints
from lirank.schema.layout import action_column, popularity_columns


class CausalFeatures:
    """What is remembered of a log up to a time.

    Args:
        schema: The schema.
        seconds: Seconds per unit of the log's times (`lirank.schema.columns.seconds_per_unit`).
    """

    def __init__(self, schema: Schema, seconds: float) -> None:
        self.schema = schema
        self.seconds = seconds
        self._popularity = {f.name: PopularityState(f, seconds) for f in schema.of(Popularity)}
        self._history = {f.name: HistoryState(f, seconds) for f in schema.of(History)}

    def extend(self, table: pa.Table) -> pa.Table:
        """Add the causal columns to a piece of the log, each row's from strictly earlier rows; then remember the piece.

        Args:
            table: Rows in time order, none before the piece before.

        Returns:
            The table with the columns added.

        Raises:
            ValueError: If a row is older than one of an earlier piece: its features would know the future.
        """
        return self._add(table, remember=True)

    def lookup(self, table: pa.Table) -> pa.Table:
        """Add the causal columns to requests, and remember nothing.

        Args:
            table: Rows with ids and times.

        Returns:
            The table with the columns added.

        Raises:
            ValueError: If a row is older than what is remembered.
        """
        return self._add(table, remember=False)

    def observe(self, table: pa.Table) -> None:
        """Remember events.

        Args:
            table: Rows in time order, with labels.
        """
        self._add(table, remember=True)

    def _add(self, table: pa.Table, *, remember: bool) -> pa.Table:
        if not self.schema.causal or self.schema.time is None:
            return table
        times = as_times(self.schema.time.column, column_of(table, self.schema.time.column))
        for feature in self.schema.of(Popularity):
            keys = combined([self._keys(table, name) for name in feature.key])
            state = self._popularity[feature.name]
            if remember:
                found = state.scan(keys, times, label_values(self.schema.label(feature.label), table))
            else:
                found = state.lookup(keys, times)
            for name, values in zip(popularity_columns(feature), found.T, strict=True):
                table = table.append_column(name, pa.array(values))
        for feature in self.schema.of(History):
            keys = self._keys(table, feature.key)
            memory = self._history[feature.name]
            if remember:
                labels = label_values(self.schema.label(feature.action), table) if feature.action else None
                items, offsets, actions = memory.scan(keys, times, self._keys(table, feature.item), labels)
            else:
                items, offsets, actions = memory.lookup(keys, times)
            lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(items))
            table = table.append_column(feature.name, lists)
            if feature.action:
                lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(actions.astype(np.int8)))
                table = table.append_column(action_column(feature), lists)
        return table

    def _keys(self, table: pa.Table, name: str) -> np.ndarray:
        feature = self.schema.feature(name)
        return fingerprints(column(feature), column_of(table, column(feature)), feature.type)[0]

    def grown(self, schema: Schema) -> "CausalFeatures":
        """The same memory under a schema that may have more features; those begin without memory.

        Args:
            schema: The new schema (see `lirank.schema.evolve.check_evolution`).

        Returns:
            The new memory; this one is left as it is.
        """
        found = CausalFeatures(schema, self.seconds)
        mine = self._states()
        for name, state in found._states().items():
            if name in mine:
                state.load_state({key: value.copy() for key, value in mine[name].state().items()})
        return found

    def forget(self, before: int) -> int:
        """Forget keys without an event since a time: they are new to the features from then on.

        Args:
            before: Time in the log's unit.

        Returns:
            Keys that were forgotten, over all features.
        """
        return sum(state.forget(before) for state in self._states().values())

    def _states(self) -> dict[str, Any]:
        return {**self._popularity, **self._history}

    def state(self) -> dict[str, np.ndarray]:
        """What is remembered.

        Returns:
            Everything, as arrays by name.
        """
        return {f"{n}.{k}": v for n, s in self._states().items() for k, v in s.state().items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned.

        Args:
            state: Arrays by name.

        Raises:
            ValueError: If it belongs to another schema.
        """
        try:
            for name, owner in self._states().items():
                owner.load_state({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
        except (KeyError, IndexError) as error:
            raise ValueError(f"state: {error} is missing; it belongs to another schema") from error
