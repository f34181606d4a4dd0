"""Scores for raw rows: the schema's columns in, probabilities out, by the code that trained the model.

A request names what a log row would: ids, numbers, lists, the time. Histories and popularity are looked up in the
memory that training left and that `observe` carries on, so a log replayed through a scorer gets the scores that it
gets offline.
"""

import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import torch
from core_tensor.app.extras import require

from lirank.data.batch import label_values
from lirank.explore.run import Explorer, Kind
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
        explorer: Belief about the last layer, for `explore`; None for none.
    """

    def __init__(
        self,
        trained: TrainedModel,
        runtime: OnnxModel | None = None,
        causal: CausalFeatures | None = None,
        explorer: Explorer | None = None,
    ) -> None:
        self.explorer = explorer
        self.encoder, self.causal = trained.encoder, causal or trained.causal
        self.served = ServedModel(trained.model)
        self._runtime = runtime or TorchModel(self.served)
        self.monitor = DriftMonitor()
        self._lock = threading.Lock()
        self.labels = [label.name for label in trained.encoder.schema.labels]

    @classmethod
    def open(cls, folder: Path, onnx: Path | None = None, posterior: Path | None = None) -> "Scorer":
        """A scorer from the folder of a run.

        Args:
            folder: The run.
            onnx: What `lirank export` wrote of it; None computes with torch.
            posterior: What `lirank explore fit` wrote of it; None for scores without exploration only.

        Returns:
            The scorer.

        Raises:
            ValueError: If the run or the model cannot be read, or the model gives other scores than the run.
        """
        trained = TrainedModel.load(folder)
        explorer = Explorer.open(trained, folder, posterior) if posterior else None
        scorer = cls(trained, OnnxModel(onnx) if onnx else None, explorer=explorer)
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

    def explore(
        self, rows: pa.Table, kind: Kind, *, alpha: float = 1.0, draws: int = 0, seed: int | None = None
    ) -> dict[str, np.ndarray]:
        """Score the candidates of one request so that something is learned; computed by torch, with the table as it is.

        Args:
            rows: Columns of `request_schema`.
            kind: `greedy`, `ucb`, or `thompson` with one draw of the last layer for the request.
            alpha: Standard deviations of `ucb`.
            draws: Posterior draws for the probability with which `thompson` puts each candidate first, which a log has
                to hold for later estimates; 0 leaves it out.
            seed: Seed of the draws; None for a random one.

        Returns:
            Probability of the explored label by its name, shape (n,), and with draws `propensity`, shape (n,).

        Raises:
            ValueError: If there is no posterior, or a value is not allowed.
        """
        if self.explorer is None:
            raise ValueError("explore: expected a posterior (see `lirank explore fit` and `lirank serve --posterior`)")
        name = self.labels[self.explorer.task]
        if rows.num_rows == 0:
            return {name: np.zeros(0, np.float32)} | ({"propensity": np.zeros(0)} if draws else {})
        with self._lock:
            extended = self.causal.lookup(rows)
        batch = self.encoder.encode(extended, labels=False)
        check_feeds(self.encoder.layout, feeds_of(self.served, batch))
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        logits = self.explorer.logits(batch, kind, alpha=alpha, generator=generator)
        found = {name: self.explorer.probabilities(batch, logits).numpy()}
        if draws:
            found["propensity"] = self.explorer.first_places(batch, draws, generator).numpy()
        return found

    def observe(self, rows: pa.Table) -> None:
        """Remember events, and compare what was predicted for them with what happened.

        Args:
            rows: Columns of the log, labels too, in time order.

        Raises:
            ValueError: If a value is not allowed, or an event is older than those remembered.
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


class Exploration(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Options of a request to `/score`.

    Attributes:
        explore: Empty for plain scores of all labels; else the policy.
        alpha: Standard deviations of `ucb`.
        draws: Draws for propensities of `thompson`; 0 for none.
        seed: Seed of the draws; None for a random one.
    """

    explore: Literal["", "greedy", "ucb", "thompson"] = ""
    alpha: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0
    draws: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] | None = None


def build(
    folder: Path, onnx: Path | None, *, remember: bool = True, limits: Any = None, posterior: Path | None = None
) -> Any:
    """The HTTP service of a run.

    Args:
        folder: The run.
        onnx: Its export, or None for torch.
        remember: Whether `POST /observe` carries the memory on; a service of several workers must not, since each
            would remember its own share.
        limits: `core_tensor.app.serving.Limits`.
        posterior: What `lirank explore fit` wrote, for requests with the option `explore`.

    Returns:
        An ASGI application with `POST /score`, `POST /observe`, `GET /health` and `GET /metrics`.
    """
    serving = require("core_tensor.app.serving", EXTRA)
    scorer = Scorer.open(folder, onnx, posterior)
    schema = scorer.encoder.schema

    def score(rows: pa.Table, options: dict[str, Any]) -> dict[str, np.ndarray]:
        try:
            asked = msgspec.convert(options, Exploration)
        except msgspec.ValidationError as error:
            raise ValueError(f"options: {error}") from error
        if asked.explore:
            kind: Kind = asked.explore
            return scorer.explore(rows, kind, alpha=asked.alpha, draws=asked.draws, seed=asked.seed)
        return dict(zip(scorer.labels, scorer.score(rows).T, strict=True))

    def observe(rows: pa.Table, options: dict[str, Any]) -> dict[str, list[int]]:
        del options
        scorer.observe(rows)
        return {"observed": [rows.num_rows]}

    endpoints = [serving.Endpoint("/score", score, request_schema(schema), "Probability of every label")]
    if remember:
        described = "Remember events with their labels"
        endpoints.append(serving.Endpoint("/observe", observe, request_schema(schema, labels=True), described))
    explored = scorer.labels[scorer.explorer.task] if scorer.explorer else None
    information = {"labels": scorer.labels, "columns": request_schema(schema).names, "explores": explored}
    return serving.application(
        "lirank", endpoints, limits=limits, information=lambda: {**information, "calibration": scorer.monitor.report()}
    )
