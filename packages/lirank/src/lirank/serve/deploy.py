"""From a run to what is served: recalibrated, compressed, exported and checked, with its latency."""

import copy
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from core_tensor.app.files import write_buffered

from lirank.data.batch import Batch
from lirank.evaluate.calibration import Curve, fit_curve
from lirank.evaluate.metrics import report
from lirank.layers.isotonic import IsotonicLayer
from lirank.serve.compress import QuantizedTable
from lirank.serve.export import OnnxModel, ServedModel, TorchModel, export_onnx, export_program, feeds_of
from lirank.train.checkpoint import save
from lirank.train.run import TrainedModel

TOLERANCE = 1e-5
"""Largest difference between an exported model and the one that it came from."""
CANDIDATES = (1, 64, 512)
_OWN_CURVE = 500
"""Positives, and negatives, with which a calibration context gets its own curve."""


def recalibrate(
    trained: TrainedModel, scores: dict[str, Any], method: Literal["auto", "shift", "platt", "isotonic"] = "auto"
) -> dict[str, dict[str, Any]]:
    """Fit the isotonic layers to labels; the rest of the model stays as it is.

    The first half of the rows fits curves that the second half judges; the layers then get the curves of all rows. A
    calibration context with enough positives and negatives gets its own curve, the others share one. With few positives
    the curve of the layer is kept and only moved.

    Args:
        trained: The model, changed in place.
        scores: `logits` without calibration (n, T), `labels` (n, T), in time order, and `context` (n,) where the model
            calibrates by context.
        method: How the curves are fitted; see `fit_curve`.

    Returns:
        By label: the method, contexts with their own curve, and metrics of the second half before and after.

    Raises:
        ValueError: If a label has one class only.
    """
    found = {}
    for t, label in enumerate(trained.encoder.schema.labels):
        known = ~np.isnan(scores["labels"][:, t])
        z, y = scores["logits"][known, t].astype(np.float64), scores["labels"][known, t].astype(np.float64)
        context = scores["context"][known] if scores.get("context") is not None else None
        layer = trained.model.network.calibration[t]
        assert isinstance(layer, IsotonicLayer)
        half = len(z) // 2
        rest = None if context is None else context[half:]
        trial = copy.deepcopy(layer)
        before = _applied(trial, z[half:], rest)
        _fit(trial, z[:half], y[:half], None if context is None else context[:half], method)
        after = _applied(trial, z[half:], rest)
        used, own = _fit(layer, z, y, context, method)
        found[label.name] = {
            "method": used,
            "contexts": own,
            "before": report(before, y[half:]),
            "after": report(after, y[half:]),
        }
    return found


def _applied(layer: IsotonicLayer, z: np.ndarray, context: np.ndarray | None) -> np.ndarray:
    """Calibrated probabilities of logits, shape (n,)."""
    with torch.no_grad():
        logits = layer(torch.from_numpy(z).float(), None if context is None else torch.from_numpy(context))
    found: np.ndarray = torch.sigmoid(logits).numpy()
    return found


def _fit(
    layer: IsotonicLayer, z: np.ndarray, y: np.ndarray, context: np.ndarray | None, method: Any
) -> tuple[str, int]:
    """Give a layer the curves of some rows; returns the method, and how many contexts have their own."""
    contexts = np.unique(context).tolist() if context is not None else []
    present = {number: _present(layer, number) for number in (0, *contexts)}
    options: Any = {"method": method, "low": layer.low, "high": layer.high}
    curve = fit_curve(z, y, present=present[0], **options)
    layer.set_curve(torch.from_numpy(curve.logits), torch.from_numpy(curve.values))
    own = 0
    for number in contexts:
        mine = context == number
        if min(y[mine].sum(), (1 - y[mine]).sum()) >= _OWN_CURVE:
            curve_of = fit_curve(z[mine], y[mine], present=present[number], **options)
            layer.set_curve(torch.from_numpy(curve_of.logits), torch.from_numpy(curve_of.values), number)
            own += 1
    return curve.method, own


def _present(layer: IsotonicLayer, context: int) -> Curve:
    """The curve that a context has now."""
    edges = torch.linspace(layer.low, layer.high, layer.buckets + 1)
    with torch.no_grad():
        values = layer(edges, torch.full((len(edges),), context) if layer.contexts else None)
    return Curve(edges.double().numpy(), values.double().numpy(), "present")


def compress(trained: TrainedModel, batch: Batch, out: Path | None) -> dict[str, Any]:
    """Put the table into 8 bits and measure what that costs.

    Args:
        trained: The model.
        batch: Rows to measure on, with labels.
        out: File for codes, scales and biases (safetensors); None writes nothing.

    Returns:
        Bytes before and after, relative error of the rows, and by label the metrics with both tables.
    """
    table = QuantizedTable(trained.model.table)
    served, plain = ServedModel(trained.model, "int8"), trained.model.predict(batch).numpy()
    small = TorchModel(served)(feeds_of(served, batch))
    if out is not None:
        arrays = {"codes": table.codes, "scale": table.scale, "bias": table.bias}
        save(out, arrays, {"rows": len(table.codes), "dim": table.dim})
    assert batch.labels is not None
    labels = batch.labels.numpy()
    return {
        **table.memory(),
        "relative_error": table.error(trained.model.table),
        "largest_difference": float(np.abs(small - plain).max()),
        "labels": {
            label.name: {"float32": report(plain[:, t], labels[:, t]), "int8": report(small[:, t], labels[:, t])}
            for t, label in enumerate(trained.encoder.schema.labels)
        },
    }


def export(
    trained: TrainedModel, batch: Batch, path: Path, table: Literal["int8", "float32"] = "int8"
) -> dict[str, Any]:
    """Export to ONNX (`.onnx`) or torch.export (`.pt2`), and compare the file's scores with the model's.

    Args:
        trained: The model.
        batch: At least two rows to trace and compare with.
        path: The file.
        table: How the table is stored.

    Returns:
        Largest difference over the rows, bytes, rows compared.

    Raises:
        ValueError: If the suffix is another one, or the exported model differs by more than 1e-5.
        MissingExtraError: If ONNX is asked for and not installed.
    """
    if path.suffix not in {".onnx", ".pt2"}:
        raise ValueError(f"{path}: expected a name that ends in .onnx or .pt2")
    served = ServedModel(trained.model, table)
    few = batch.take(torch.arange(min(len(batch), 4)))
    feeds = feeds_of(served, batch)
    expected = TorchModel(served)(feeds)
    if path.suffix == ".onnx":
        export_onnx(served, few, path)
        found = OnnxModel(path)(feeds)
    else:
        program = export_program(served, few)
        write_buffered(path, lambda file: torch.export.save(program, file))
        tensors = [torch.from_numpy(array) for array in feeds.values()]
        with torch.no_grad():
            found = torch.export.load(path).module()(*tensors).numpy()
    gap = float(np.abs(found - expected).max())
    if not gap <= TOLERANCE:
        raise ValueError(f"{path}: the exported model differs from the trained one by {gap:.2g}, over {TOLERANCE:g}")
    return {"max_difference": gap, "bytes": path.stat().st_size, "rows": len(batch), "table": table}


def latency(model: OnnxModel | TorchModel, served: ServedModel, batch: Batch, repeats: int = 200) -> dict[str, Any]:
    """Time of a request of 1, 64 and 512 candidates inside the runtime.

    Args:
        model: What computes.
        served: The model that it came from.
        batch: Rows to take candidates from; they are repeated if there are fewer.
        repeats: Requests of each size.

    Returns:
        `p50_ms` and `p99_ms` by number of candidates.
    """
    found = {}
    for count in CANDIDATES:
        feeds = feeds_of(served, batch.take(torch.arange(count) % len(batch)))
        times = []
        for _ in range(repeats + 5):
            start = time.perf_counter()
            model(feeds)
            times.append(1e3 * (time.perf_counter() - start))
        p50, p99 = np.quantile(times[5:], [0.5, 0.99])
        found[str(count)] = {"p50_ms": float(p50), "p99_ms": float(p99)}
    return found
