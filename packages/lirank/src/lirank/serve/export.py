"""A model as one graph: 8-bit tables, network, calibration and the correction for sampled negatives inside."""

import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from core_tensor.app.extras import require
from core_tensor.app.files import atomic_path
from core_tensor.checks import check_choice
from torch import Tensor, nn

from lirank.data.batch import Batch, Ragged
from lirank.layers.table import FusedTable
from lirank.model.network import Vectors, calibration_context
from lirank.model.ranker import Ranker
from lirank.schema.features import History, Id
from lirank.serve.checks import input_names
from lirank.serve.compress import QuantizedTable

EXTRA = "lirank[export]"
_SHORTEST = 2
"""Shortest padded list: a graph traced with length 1 or 0 would hold for that length only."""


class ServedModel(nn.Module):
    """Probabilities from tensors, with nothing ragged in between.

    Args:
        model: A trained model.
        table: `int8` or `float32`.
    """

    def __init__(self, model: Ranker, table: Literal["int8", "float32"] = "int8") -> None:
        super().__init__()
        check_choice("table", table, ("int8", "float32"))
        self.layout, self.network, self.correction = model.layout, model.network, model.correction
        self.table: QuantizedTable | FusedTable = QuantizedTable(model.table) if table == "int8" else model.table
        self.features = len(self.layout.schema.of(Id))
        self.register_buffer("fields", torch.tensor(self.layout.fields, dtype=torch.int64), persistent=False)
        self.eval()

    def _rows(self, ids: Tensor) -> Tensor:
        if isinstance(self.table, FusedTable):
            return nn.functional.embedding(ids, self.table.weight)
        found: Tensor = self.table(ids)
        return found

    def forward(self, *inputs: Tensor) -> Tensor:
        """Score.

        Args:
            *inputs: In the order of `input_names`.

        Returns:
            Probabilities, shape (B, T).
        """
        named = dict(zip(input_names(self.layout), inputs, strict=True))
        ids = self._rows(named["ids"])
        if ids.shape[1] != self.features:
            summed = ids.new_zeros(ids.shape[0], self.features, ids.shape[2])
            ids = summed.index_add(1, self.get_buffer("fields"), ids)
        bags = []
        for bag in self.layout.bags:
            rows, lengths = named[bag.name], named[f"{bag.name}.lengths"]
            there = (torch.arange(rows.shape[1]) < lengths[:, None])[:, :, None]
            total = torch.where(there, self._rows(rows), 0.0).sum(1)
            bags.append(total / lengths.clamp_min(1)[:, None] if bag.pooling == "mean" else total)
        sequences = [
            (self._rows(named[f.name]), named.get(f"{f.name}.action"), named[f"{f.name}.lengths"])
            for f in self.layout.sequences
        ]
        context = calibration_context(named["ids"], self.layout, self.network.config)
        logits: Tensor = self.network(Vectors(ids, named["dense"], bags, sequences, context))
        return torch.sigmoid(logits + self.correction)


def feeds_of(model: ServedModel, batch: Batch) -> dict[str, np.ndarray]:
    """A batch as the arrays that an exported model takes.

    Args:
        model: The model.
        batch: What the encoder made.

    Returns:
        Arrays by name, in the order of `input_names`.
    """
    layout = model.layout
    feeds = {"ids": batch.ids.numpy(), "dense": batch.dense.numpy()}
    for feature in (*layout.bags, *layout.sequences):
        lists, fill = batch.lists[feature.name], layout.span(feature.name)[0]
        feeds[feature.name] = _padded(lists, lists.values, fill)
        feeds[f"{feature.name}.lengths"] = lists.offsets.diff().numpy()
        if isinstance(feature, History) and feature.action:
            actions = lists.actions if len(lists.actions) else torch.zeros_like(lists.values)
            feeds[f"{feature.name}.action"] = _padded(lists, actions, 0)
    return feeds


def _padded(lists: Ragged, values: Tensor, fill: int) -> np.ndarray:
    lengths = lists.offsets.diff().numpy()
    width = max(int(lengths.max(initial=0)), _SHORTEST)
    found = np.full((len(lengths), width), fill, np.int64)
    found[np.arange(width) < lengths[:, None]] = values.numpy()
    return found


def export_program(model: ServedModel, example: Batch) -> Any:
    """Trace a model for any number of rows and any length of lists.

    Args:
        model: The model.
        example: At least two rows; a single one would be taken for the only size there is.

    Returns:
        A `torch.export.ExportedProgram`.

    Raises:
        ValueError: If the example has fewer than two rows.
    """
    if len(example) < 2:
        raise ValueError(f"example: expected at least 2 rows, got {len(example)}")
    feeds = {name: torch.from_numpy(array) for name, array in feeds_of(model, example).items()}
    batch = torch.export.Dim("batch", min=1)
    dynamic: list[dict[int, Any]] = []
    for name, tensor in feeds.items():
        shape: dict[int, Any] = {0: batch}
        if tensor.ndim == 2 and name not in {"ids", "dense"}:
            shape[1] = torch.export.Dim(f"length_{name.removesuffix('.action').replace('.', '_')}", min=1)
        dynamic.append(shape)
    with torch.no_grad():
        return torch.export.export(model, tuple(feeds.values()), dynamic_shapes=(tuple(dynamic),), strict=False)


def export_onnx(model: ServedModel, example: Batch, path: Path) -> None:
    """Write a model as ONNX, in one file.

    Args:
        model: The model.
        example: At least two rows.
        path: The file.

    Raises:
        ValueError: If the example has fewer than two rows.
        MissingExtraError: If onnx or onnxscript is not installed.
    """
    require("onnx", EXTRA)
    require("onnxscript", EXTRA)
    program = export_program(model, example)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself, as are these lines of its log
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            program,
            (),
            temporary,
            input_names=input_names(model.layout),
            output_names=["probabilities"],
            external_data=False,
            verbose=False,
        )


class OnnxModel:
    """An exported model on onnxruntime, one thread per worker.

    Args:
        path: The file.
        threads: Threads inside a request; concurrent requests need their own workers instead.

    Raises:
        MissingExtraError: If onnxruntime is not installed.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        runtime = require("onnxruntime", EXTRA)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ValueError(f"{path}: expected an ONNX model ({' '.join(str(error).split())[:200]})") from error
        self._names = [entry.name for entry in self._session.get_inputs()]

    def __call__(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Probabilities, shape (B, T)."""
        kept = {name: feeds[name] for name in self._names}  # a graph drops inputs without columns
        found: np.ndarray = self._session.run(None, kept)[0]
        return found


class TorchModel:
    """The same interface on torch, for runs that were not exported.

    Args:
        model: The model.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    @torch.no_grad()
    def __call__(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Probabilities, shape (B, T)."""
        found: np.ndarray = self._model(*(torch.from_numpy(array) for array in feeds.values())).numpy()
        return found
