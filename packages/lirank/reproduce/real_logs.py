"""The full model, its parts, LightGBM and logistic regression on MovieLens-100k and Amazon; at least five seeds.

    python reproduce/real_logs.py [--seeds 5] [--work FOLDER]

Writes `results/real_logs.json`. The last tenth of each user's events tests, causal features come from strictly earlier
rows, the tenth before chooses epochs and LightGBM's settings. Differences are between mean probabilities over seeds,
with 95 % intervals of a paired bootstrap over users.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import logs
import numpy as np
import torch
from core_tensor.app.files import write_json
from lirank.data.parquet import ParquetLog
from lirank.data.split import Split
from lirank.evaluate import baseline
from lirank.evaluate.compare import compare
from lirank.evaluate.metrics import auc, logloss
from lirank.features.prepare import Prepared, prepare
from lirank.model.config import ModelConfig
from lirank.model.ranker import Ranker
from lirank.train.loop import TrainConfig, Trainer, score

RESULTS = Path(__file__).parent / "results" / "real_logs.json"
MODELS: dict[str, tuple[int, ModelConfig]] = {
    "low-rank DCN + MLP": (0, ModelConfig()),
    "full DCN + MLP": (0, ModelConfig(cross="full")),
    "Residual DCN + low-rank DCN + MLP": (0, ModelConfig(cross="residual")),
    "+ dense gate": (0, ModelConfig(gate="dense")),
    "+ large MLP (512, 256)": (0, ModelConfig(widths=(512, 256))),
    "+ history": (12, ModelConfig()),
    "+ history, Residual DCN, dense gate": (12, ModelConfig(cross="residual", gate="dense")),
}
BASE = "low-rank DCN + MLP"

JUDGED = "+ history"
"""The model that the bar compares with LightGBM, fixed before anything ran; the test rows chose none."""


def fit(prepared: Prepared, config: ModelConfig, seed: int, folder: Path) -> np.ndarray:
    """Probabilities of the test rows, shape (n,)."""
    encoder = prepared.encoder()
    torch.manual_seed(seed)
    model = Ranker(encoder, config)
    train, test = prepared.log("train"), prepared.log("test")
    assert train is not None
    assert test is not None
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        Trainer(model, encoder, TrainConfig(epochs=8, seed=seed)).fit(train, prepared.log("valid"), Path(scratch))
    found: np.ndarray = score(model, encoder, test)["p"][:, 0]
    return found


def evidence(name: str, seeds: int, work: Path, split: Split, models: list[str]) -> dict[str, Any]:
    """All models on one log; the last one is what LightGBM is compared with."""
    path = logs.write(name, work)
    prepared = {
        length: prepare(ParquetLog.open(path), logs.schema(name, length), split, work / f"{name}-{split.kind}-{length}")
        for length in {MODELS[m][0] for m in models}
    }
    plain = prepared[min(prepared)]
    encoder = plain.encoder()
    train, valid, test = (
        baseline.load_rows(encoder, log) for part in ("train", "valid", "test") if (log := plain.log(part))
    )
    assert test.batch.group is not None
    y, groups = test.label, test.batch.group.numpy()
    scores = {"logistic regression": [baseline.logistic_regression(encoder.layout, train, valid, test)]}
    scores["LightGBM"] = [baseline.lightgbm(encoder.layout, train, valid, test, seed)[0] for seed in range(seeds)]
    for model in models:
        length, config = MODELS[model]
        scores[model] = [fit(prepared[length], config, seed, work) for seed in range(seeds)]
        print(name, model, [round(auc(p, y) or 0.0, 4) for p in scores[model]], flush=True)
    mean = {model: np.mean(p, axis=0) for model, p in scores.items()}
    rows = []
    for model, p in scores.items():
        row: dict[str, Any] = {
            "model": model,
            "auc": float(np.mean([auc(q, y) for q in p])),
            "auc_sd": float(np.std([auc(q, y) for q in p])),
            "logloss": float(np.mean([logloss(q, y) for q in p])),
        }
        for other, key in (("LightGBM", "vs_lightgbm"), (BASE, "vs_base")):
            found = compare(mean[model], mean[other], y, groups, draws=300).auc if model != other else None
            ends = (None,) * 3 if found is None else (found.value, found.low, found.high)
            row |= dict(zip((key, f"{key}_low", f"{key}_high"), ends, strict=True))
        rows.append(row)
    by_model = {row["model"]: row for row in rows}
    full = by_model[JUDGED]
    return {
        "rows": {part: plain.rows[part] for part in plain.rows},
        "seeds": seeds,
        "models": rows,
        "auc_vs_lightgbm": full["auc"] - by_model["LightGBM"]["auc"],
        "logloss_vs_lightgbm": full["logloss"] - by_model["LightGBM"]["logloss"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(exist_ok=True, parents=True)
        user = Split("user", 0.1, 0.1, future=True)
        found = {"movielens": evidence("movielens", options.seeds, work, user, list(MODELS))}
        write_json(RESULTS, found)
        found["amazon"] = evidence("amazon", options.seeds, work, user, [BASE, "+ history"])
        write_json(RESULTS, found)
        found["amazon_by_time"] = evidence("amazon", options.seeds, work, Split("time"), [BASE, "+ history"])
        write_json(RESULTS, found)
