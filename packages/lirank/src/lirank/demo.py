"""The demo: a log with known truth through every step, from Parquet to an exported model that scores like the run."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from core_tensor.app.figures import pyplot, save
from core_tensor.app.files import write_json

from lirank.data.parquet import ParquetLog
from lirank.data.split import Split
from lirank.evaluate.metrics import calibration_error, report
from lirank.evidence.generator import Market, generate
from lirank.features.prepare import Prepared
from lirank.model.config import ModelConfig
from lirank.serve import deploy
from lirank.serve.export import OnnxModel, ServedModel, feeds_of
from lirank.train.loop import TrainConfig
from lirank.train.run import DATA, TrainedModel
from lirank.workflow import calibrate_run, prepared_baselines, scored_rows, train_run

_BINS = 15


def run_demo(folder: Path, *, quick: bool, seed: int) -> dict[str, Any]:
    """Generate a log, train, calibrate, compress, export and score; write a table and a reliability picture.

    Args:
        folder: Where everything goes.
        quick: A smaller log.
        seed: Seed of the log and the training.

    Returns:
        `models` (one row each), and figures of the compression and the export.
    """
    # 1. a log whose true probabilities are known
    users, items, events = (250, 120, 30_000) if quick else (1000, 400, 150_000)
    market = Market(
        users=users, items=items, events=events, ids=1.0, crosses=0.5, history=1.0, calibration=0.5, seed=seed
    )
    made = generate(market)
    log_path = folder / "log.parquet"
    pq.write_table(made.log, log_path, row_group_size=8192)
    made.schema.save(folder / "schema.yaml")
    # 2. train, then refresh the calibration from the validation rows
    run, calibrated = folder / "run", folder / "calibrated"
    run.mkdir()
    calibrated.mkdir()
    training = TrainConfig(epochs=4, batch_size=512, lr=3e-3, row_lr=3e-2, seed=seed)  # few steps need large rates
    trained = train_run(ParquetLog.open(log_path), made.schema, Split(), ModelConfig(widths=(64, 32)), training, run)
    curves = calibrate_run(run, None, calibrated)
    # 3. compress, export, and score the test rows with what was exported
    model = TrainedModel.load(calibrated)
    label = model.encoder.schema.labels[0].name
    prepared = Prepared(run / DATA, trained["rows"], trained["notes"])
    test = prepared.log("test")
    assert test is not None
    batch = model.encoder.encode(next(test.read(rows=1 << 20)))
    compressed = deploy.compress(model, batch, None)
    exported = deploy.export(model, batch.take(torch.arange(min(512, len(batch)))), folder / "model.onnx")
    onnx = OnnxModel(folder / "model.onnx")
    served = onnx(feeds_of(ServedModel(model.model), batch))[:, 0]
    # 4. the table
    scored = scored_rows(TrainedModel.load(run), run, None, "")
    truth = np.asarray(made.truth.column(label))[-len(served) :]
    y, groups = scored["labels"][:, 0], scored["group"]
    found = {"truth (Bayes)": report(truth, y, groups)}
    found |= {name: entry for name, entry in prepared_baselines(prepared, seed)[label].items() if name != "base rate"}
    found["lirank"] = report(scored["p"][:, 0], y, groups)
    found["lirank, calibrated, int8, ONNX"] = report(served, y, groups)
    best, linear = found["truth (Bayes)"]["auc"], found["logistic regression"]["auc"]
    rows = [
        {
            "model": name,
            "auc": entry["auc"],
            "gap to truth closed": (entry["auc"] - linear) / (best - linear),
            "logloss": entry["logloss"],
            "calibration error": entry["calibration_error"],
        }
        for name, entry in found.items()
    ]
    curve = {"lirank": scored["p"][:, 0], "calibrated": served, "truth": truth}
    _picture({name: reliability(p, y) for name, p in curve.items()}, folder / "reliability.png")
    result = {
        "rows": trained["rows"],
        "models": rows,
        "calibration": {name: entry["method"] for name, entry in curves.items()},
        "distance_to_truth": {
            "lirank": float(np.sqrt(np.mean((scored["p"][:, 0] - truth) ** 2))),
            "calibrated": float(np.sqrt(np.mean((served - truth) ** 2))),
        },
        "int8_memory": compressed["ratio"],
        "export_max_difference": exported["max_difference"],
        "calibration_error_gain": calibration_error(scored["p"][:, 0], y) - calibration_error(served, y),
    }
    write_json(folder / "demo.json", result)
    return result


def reliability(p: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean prediction and observed rate in bins of equal mass, shape (bins,) each."""
    pieces = np.array_split(np.argsort(p, kind="stable"), _BINS)
    return np.array([p[i].mean() for i in pieces]), np.array([labels[i].mean() for i in pieces])


def _picture(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    plt = pyplot("lirank[plot]")
    figure, axes = plt.subplots(figsize=(5, 5))
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, (predicted, observed) in curves.items():
        axes.plot(predicted, observed, marker="o", markersize=3, label=name)
    limit = max(float(max(p.max(), o.max())) for p, o in curves.values()) * 1.05
    axes.set(xlim=(0, limit), ylim=(0, limit), xlabel="predicted", ylabel="observed", title="Reliability, test rows")
    axes.legend()
    save(figure, path)
