"""iPinYou by time: a model of rare clicks whose base rate falls to a tenth between training and test."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from core_tensor.dev.testing import shared_data
from lirank.data.batch import Encoder
from lirank.data.parquet import ParquetLog
from lirank.evaluate.calibration import Curve, fit_curve
from lirank.evaluate.metrics import auc, logloss
from lirank.model.config import ModelConfig
from lirank.model.ranker import Ranker
from lirank.schema.features import parse_schema
from lirank.train.loop import TrainConfig, Trainer, score

SCHEMA = "features: [{kind: multi, name: ids, rows: 65536}]\nlabels: [{name: click}]"
IDENTITY = Curve(np.array([-12.0, 8.0]), np.array([-12.0, 8.0]), "identity")


def evidence(seeds: Iterable[int], epochs: int = 8) -> dict[str, Any]:
    """Logloss over the constant's, by how the logits are calibrated; means over seeds.

    The last tenth of the training period stops training and gives a first calibration. Of the test rows the first tenth
    (a handful of clicks) recalibrates and the rest judges.
    """
    table = pq.read_table(shared_data("ranking_logs", "ipinyou_sample.parquet"))
    later = np.asarray(table["split"].to_pylist()) == "test"
    earlier = table.filter(pa.array(~later)).drop_columns("split")
    test = table.filter(pa.array(later)).drop_columns("split")
    last = earlier.num_rows // 10
    train, valid = earlier.slice(0, earlier.num_rows - last), earlier.slice(earlier.num_rows - last)
    runs = [_run(train, valid, test, seed, epochs) for seed in seeds]
    ratios = {name: [run["ratio"][name] for run in runs] for name in runs[0]["ratio"]}
    rows = [
        {"calibration": name, "logloss_over_constant": float(np.mean(values)), "sd": float(np.std(values))}
        for name, values in ratios.items()
    ]
    return {
        "rows": rows,
        "auc": float(np.mean([run["auc"] for run in runs])),
        "click_rate": {
            "training": float(np.mean(train["click"])),
            "validation": float(np.mean(valid["click"])),
            "test": float(np.mean(test["click"])),
        },
        "clicks": {"validation": int(np.sum(valid["click"])), **runs[0]["clicks"]},
        "calibration_shift": rows[-1]["logloss_over_constant"],
    }


def _run(train: pa.Table, valid: pa.Table, test: pa.Table, seed: int, epochs: int) -> dict[str, Any]:
    encoder = Encoder(parse_schema(SCHEMA))
    encoder.observe(train)
    torch.manual_seed(seed)
    model = Ranker(encoder, ModelConfig(dim=8, widths=(16,), cross="none"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, rows in (("train", train), ("valid", valid), ("test", test)):
            pq.write_table(rows, folder / f"{name}.parquet", row_group_size=8192)
        logs = {name: ParquetLog.open(folder / f"{name}.parquet") for name in ("train", "valid", "test")}
        training = TrainConfig(epochs=epochs, batch_size=512, row_lr=2e-3, cold_share=0.0, seed=seed)
        Trainer(model, encoder, training).fit(logs["train"], logs["valid"], folder)
        (before, past), (z, y) = (_scored(model, encoder, logs[name]) for name in ("valid", "test"))
    first = len(y) // 10
    curve = fit_curve(before, past)  # what `lirank calibrate` does with the validation rows
    fits = {
        "none": IDENTITY,
        "validation rows": curve,
        "Platt of the first tenth": fit_curve(z[:first], y[:first], method="platt"),
        "shift alone": fit_curve(z[:first], y[:first], method="shift"),
        "validation rows, then a shift": fit_curve(z[:first], y[:first], present=curve),
    }
    rest = y[first:]
    constant = logloss(np.full(len(rest), rest.mean()), rest)
    p = {name: 1 / (1 + np.exp(-fit(z[first:]))) for name, fit in fits.items()}
    p = {"constant of the first tenth": np.full(len(rest), y[:first].mean()), **p}
    return {
        "ratio": {name: logloss(value, rest) / constant for name, value in p.items()},
        "auc": auc(z[first:], rest),
        "clicks": {"first tenth of the test": int(y[:first].sum()), "rest": int(rest.sum())},
    }


def _scored(model: Ranker, encoder: Encoder, log: ParquetLog) -> tuple[np.ndarray, np.ndarray]:
    found = score(model, encoder, log)
    p = found["p"][:, 0].astype(np.float64)
    return np.log(p) - np.log1p(-p), found["labels"][:, 0].astype(np.float64)
