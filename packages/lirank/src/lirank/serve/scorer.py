"""Scores for raw rows: the schema's columns in, probabilities out, by the code that trained the model.

A request names what a log row would: ids, numbers, lists, the time. Histories and popularity are looked up in the
memory that training left and that `observe` carries on, so a log replayed through a scorer gets the scores that it
gets offline.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from core_tensor.app.extras import require

from lirank.data.batch import label_values
from lirank.features.causal import CausalFeatures
from lirank.schema.features import Dense, Id, ItemSequence, Multi, Schema, column
from lirank.serve.checks import check_feeds, input_names
from lirank.serve.export import OnnxModel, ServedModel, TorchModel, feeds_of
from lirank.serve.monitor import DriftMonitor
from lirank.train.run import TrainedModel

EXTRA = "lirank[serving]"


class Scorer:
    """A trained model behind a function of rows.

    Args:
        trained: The model with its encoder.
        runtime: What computes: an `OnnxModel`, or None for torch with 8-bit tables.
        causal: What is remembered; by default what training left.
    """

    def __init__(
        self, trained: TrainedModel, runtime: OnnxModel | None = None, causal: CausalFeatures | None = None
    ) -> None:
        self.encoder, self.causal = trained.encoder, causal or trained.causal
        self.served = ServedModel(trained.model)
        self._runtime = runtime or TorchModel(self.served)
        self.monitor = DriftMonitor()
        self._lock = threading.Lock()
        self.labels = [label.name for label in trained.encoder.schema.labels]

    @classmethod
    def open(cls, folder: Path, onnx: Path | None = None) -> "Scorer":
        """A scorer from the folder of a run.

        Args:
            folder: The run.
            onnx: What `lirank export` wrote of it; None computes with torch.

        Returns:
            The scorer.

        Raises:
            ValueError: If the run or the model cannot be read, or the model gives other scores than the run.
        """
        trained = TrainedModel.load(folder)
        scorer = cls(trained, OnnxModel(onnx) if onnx else None)
        if onnx is not None:
            scorer._compare(onnx)
        return scorer

    def _compare(self, onnx: Path) -> None:
        """Refuse an ONNX file of another run: it must score two plain rows as this one does."""
        layout = self.encoder.layout
        feeds: dict[str, np.ndarray] = {
            "ids": np.array([[start for start, _ in layout.ranges]] * 2, np.int64).reshape(2, -1),
            "dense": np.zeros((2, len(layout.dense)), np.float32),
        }
        for feature in (*layout.bags, *layout.sequences):
            feeds[feature.name] = np.full((2, 2), layout.span(feature.name)[0], np.int64)
            feeds[f"{feature.name}.lengths"] = np.array([0, 2])
            feeds[f"{feature.name}.action"] = np.zeros((2, 2), np.int64)
        feeds = {name: feeds[name] for name in input_names(layout)}
        try:
            gap = float(np.abs(self._runtime(feeds) - TorchModel(self.served)(feeds)).max())
        except Exception as error:
            raise ValueError(f"{onnx}: expected the export of this run ({' '.join(str(error).split())})") from error
        if not gap < 1e-4:
            raise ValueError(f"{onnx}: expected the export of this run, its scores differ by {gap:.2g}")

    def score(self, rows: pa.Table) -> np.ndarray:
        """Score rows.

        Args:
            rows: Columns of `request_schema`; nulls are what the schema makes of them.

        Returns:
            Probabilities, shape (n, T).

        Raises:
            ValueError: If a value is not allowed, naming column and row.
        """
        if rows.num_rows == 0:
            return np.zeros((0, len(self.labels)), np.float32)
        with self._lock:
            extended = self.causal.lookup(rows)
        feeds = feeds_of(self.served, self.encoder.encode(extended, labels=False))
        check_feeds(self.encoder.layout, feeds)
        return self._runtime(feeds)

    def observe(self, rows: pa.Table) -> None:
        """Remember events, and compare what was predicted for them with what happened.

        Args:
            rows: Columns of the log, labels too, in time order.

        Raises:
            ValueError: If a value is not allowed, or an event lies before those remembered.
        """
        if rows.num_rows == 0:
            return
        with self._lock:
            extended = self.causal.extend(rows)
        feeds = feeds_of(self.served, self.encoder.encode(extended, labels=False))
        check_feeds(self.encoder.layout, feeds)
        label = self.encoder.schema.labels[0]
        self.monitor.add(self._runtime(feeds)[:, 0], label_values(label, rows))


def request_schema(schema: Schema, *, labels: bool = False) -> pa.Schema:
    """Columns of a request and their types.

    Args:
        schema: The schema of the log.
        labels: Whether labels are among them.

    Returns:
        The columns.
    """
    kinds = {"int": pa.int64(), "string": pa.large_string()}
    found: dict[str, pa.DataType] = {}
    for feature in schema.of(Id, Dense, Multi, ItemSequence):
        if isinstance(feature, Id):
            kind = kinds[feature.type]
        elif isinstance(feature, Dense):
            kind = pa.float64()
        else:
            owner = feature if isinstance(feature, Multi) else schema.feature(feature.item)
            kind = pa.large_list(kinds[owner.type])
        found[column(feature)] = kind
    if schema.time and schema.causal:
        found[schema.time.column] = pa.int64()
    if labels:
        found |= {column(label): pa.float64() for label in schema.labels}
    return pa.schema(list(found.items()))


def build(folder: Path, onnx: Path | None, *, remember: bool = True, limits: Any = None) -> Any:
    """The HTTP service of a run.

    Args:
        folder: The run.
        onnx: Its export, or None for torch.
        remember: Whether `POST /observe` carries the memory on; a service of several workers must not, since each
            would remember its own share.
        limits: `core_tensor.app.serving.Limits`.

    Returns:
        An ASGI application with `POST /score`, `POST /observe`, `GET /health` and `GET /metrics`.
    """
    serving = require("core_tensor.app.serving", EXTRA)
    scorer = Scorer.open(folder, onnx)
    schema = scorer.encoder.schema

    def score(rows: pa.Table, options: dict[str, Any]) -> dict[str, np.ndarray]:
        if options:
            raise ValueError(f"options: expected none, got {', '.join(options)}")
        return dict(zip(scorer.labels, scorer.score(rows).T, strict=True))

    def observe(rows: pa.Table, options: dict[str, Any]) -> dict[str, list[int]]:
        del options
        scorer.observe(rows)
        return {"observed": [rows.num_rows]}

    endpoints = [serving.Endpoint("/score", score, request_schema(schema), "Probability of every label")]
    if remember:
        described = "Remember events with their labels"
        endpoints.append(serving.Endpoint("/observe", observe, request_schema(schema, labels=True), described))
    information = {"labels": scorer.labels, "columns": request_schema(schema).names}
    return serving.application(
        "lirank", endpoints, limits=limits, information=lambda: {**information, "calibration": scorer.monitor.report()}
    )
