"""The paper's components, LightGBM and logistic regression on MovieLens-100k, Amazon and Frappe.

MovieLens and Amazon: the last tenth of each user's events tests, causal features come from strictly earlier rows, the
tenth before chooses epochs and LightGBM's settings. `amazon_third` has the components on a third of the users.
`amazon_by_time` tests on the last tenth of the time. Frappe: its rows with two random apps each as negatives, divided
at random; it has no times, so no history and no popularity. Its table learns at the default rate.

Differences are between mean probabilities over seeds, with 95 % intervals of a paired bootstrap over users.
"""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _logs
import msgspec
import numpy as np
import torch
from _study import Study, study
from lirank.data.parquet import ParquetLog
from lirank.data.split import Split
from lirank.evaluate import baseline
from lirank.evaluate.compare import compare
from lirank.evaluate.metrics import auc, logloss
from lirank.features.prepare import Prepared, prepare
from lirank.model.config import ModelConfig
from lirank.model.ranker import Ranker
from lirank.train.loop import TrainConfig, Trainer, score


@dataclass(frozen=True)
class Model:
    """A network and how it is trained, with a history of some length or none."""

    config: ModelConfig = field(default_factory=ModelConfig)
    history: int = 0
    training: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=8, row_lr=2e-3))


BASE, JUDGED, TUNED = "low-rank DCN + MLP", "+ history", "+ history, tuned"
"""`JUDGED` is what the bar compares with LightGBM: fixed before anything ran; `TUNED` is chosen by validation rows."""

MODELS = {
    BASE: Model(),
    "full DCN + MLP": Model(ModelConfig(cross="full")),
    "Residual DCN + low-rank DCN + MLP": Model(ModelConfig(cross="residual")),
    "+ dense gate": Model(ModelConfig(gate="dense")),
    "+ large MLP (512, 256)": Model(ModelConfig(widths=(512, 256))),
    JUDGED: Model(history=12),
    "+ history, Residual DCN, dense gate": Model(ModelConfig(cross="residual", gate="dense"), 12),
}
_GENTLE = TrainConfig(epochs=8, row_lr=1e-3)
SETTINGS = (
    MODELS[JUDGED],
    Model(ModelConfig(dropout=0.2), 12),
    Model(ModelConfig(dropout=0.2), 12, _GENTLE),
    Model(ModelConfig(dropout=0.2), 30, _GENTLE),
)
"""What validation logloss chooses `TUNED` from: as many settings as LightGBM has."""


@dataclass(frozen=True)
class Log:
    """A log, how it is divided, and what is tried on it."""

    source: str
    split: Split
    models: tuple[str, ...]
    share: float = 1.0
    training: TrainConfig | None = None  # in place of the models' own


_USER = Split("user", 0.1, 0.1, future=True)
_WITHOUT_TIME = tuple(name for name, model in MODELS.items() if not model.history)
LOGS = {
    "movielens": Log("movielens", _USER, tuple(MODELS)),
    "movielens_tuned": Log("movielens", _USER, (BASE, JUDGED, TUNED)),
    "amazon": Log("amazon", _USER, (BASE, JUDGED)),
    "amazon_third": Log("amazon", _USER, tuple(MODELS), share=1 / 3),
    "amazon_by_time": Log("amazon", Split("time"), (BASE, JUDGED)),
    "frappe": Log("frappe", Split("random"), _WITHOUT_TIME, training=TrainConfig(epochs=8)),
}


class Bench:
    """Prepared rows of one log, and scores on its test rows."""

    def __init__(self, name: str, options: Study, work: Path) -> None:
        log = LOGS[name]
        share = log.share / 6 if options.quick else log.share
        self.log, self.options, self.work = log, options, work
        self.path = _logs.write(log.source, work, share)
        self.key = {"log": log.source, "share": share, "split": repr(log.split)}
        self.plain = self.prepared(0)
        encoder = self.plain.encoder()
        parts = {part: self.plain.log(part) for part in ("train", "valid", "test")}
        self.rows = {part: baseline.load_rows(encoder, rows) for part, rows in parts.items() if rows is not None}
        self.layout = encoder.layout

    def prepared(self, history: int) -> Prepared:
        """The log with a history of some length."""
        folder = self.work / f"{self.path.stem}-{self.log.split.kind}-{history}"
        return prepare(ParquetLog.open(self.path), _logs.schema(self.log.source, history), self.log.split, folder)

    def linear(self) -> list[np.ndarray]:
        """Logistic regression, whose solver draws nothing at random."""
        train, valid, test = self.rows["train"], self.rows["valid"], self.rows["test"]
        key = {**self.key, "name": "logistic regression"}
        return [self.options.scores(key, lambda: baseline.logistic_regression(self.layout, train, valid, test))]

    def trees(self) -> list[np.ndarray]:
        """LightGBM: the validation rows choose a setting once, which every seed takes if it draws at random."""
        train, valid, test = self.rows["train"], self.rows["valid"], self.rows["test"]
        settings = baseline.TREES[:1] if self.options.quick else baseline.TREES

        def fit(seed: int, tried: Any) -> np.ndarray:
            p, setting = baseline.lightgbm(self.layout, train, valid, test, seed, tried)
            number = next(i for i, kept in enumerate(settings) if kept.items() <= setting.items())
            return np.append(p, number)  # a finished run knows its setting

        def cached(seed: int, tried: Any) -> np.ndarray:
            key = {**self.key, "name": "LightGBM", "settings": len(tried), "seed": seed}
            return self.options.scores(key, lambda: fit(seed, tried))

        found = [cached(0, settings)]
        chosen = settings[int(found[0][-1])]
        if "feature_fraction" in chosen:
            found += [cached(seed, (chosen,)) for seed in range(1, self.options.seeds)]
        return [p[:-1] for p in found]

    def network(self, name: str, model: Model, part: str = "test") -> list[np.ndarray]:
        """A model of ours on the rows of a part, one entry per seed."""
        settings = {**model.config.to_dict(), "history": model.history, **model.training.to_dict()}
        count = self.options.seeds if part == "test" else 1
        return [
            self.options.scores(
                {**self.key, "name": name, "part": part, **settings, "seed": seed},
                lambda seed=seed: self._fit(model, seed, part),
            )
            for seed in range(count)
        ]

    def _fit(self, model: Model, seed: int, part: str) -> np.ndarray:
        prepared = self.prepared(model.history)
        encoder, train, judged = prepared.encoder(), prepared.log("train"), prepared.log(part)
        assert train is not None
        assert judged is not None
        torch.manual_seed(seed)
        ranker = Ranker(encoder, model.config)
        epochs = 2 if self.options.quick else model.training.epochs
        training = msgspec.structs.replace(model.training, seed=seed, epochs=epochs)
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            Trainer(ranker, encoder, training).fit(train, prepared.log("valid"), Path(scratch))
        found: np.ndarray = score(ranker, encoder, judged)["p"][:, 0]
        return found

    def tuned(self) -> tuple[Model, list[float]]:
        """The setting with the best validation logloss of one seed, and the loglosses."""
        y = self.rows["valid"].label
        losses = [logloss(self.network(f"setting {n}", m, "valid")[0], y) for n, m in enumerate(SETTINGS)]
        return SETTINGS[int(np.argmin(losses))], losses


def evidence(name: str, options: Study, work: Path) -> dict[str, Any]:
    """All models on one log."""
    bench = Bench(name, options, work)
    y, group = bench.rows["test"].label, bench.rows["test"].batch.group
    groups = None if group is None else group.numpy()
    scores = {"logistic regression": bench.linear(), "LightGBM": bench.trees()}
    found: dict[str, Any] = {"rows": bench.plain.rows, "seeds": options.seeds}
    for model in bench.log.models:
        if model == TUNED:
            chosen, found["settings_logloss"] = bench.tuned()
            found["chosen"] = SETTINGS.index(chosen)
        network = chosen if model == TUNED else MODELS[model]
        scores[model] = bench.network(model, replace(network, training=bench.log.training or network.training))
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
            result = compare(mean[model], mean[other], y, groups, draws=300).auc if model != other else None
            ends = (None,) * 3 if result is None else (result.value, result.low, result.high)
            row |= dict(zip((key, f"{key}_low", f"{key}_high"), ends, strict=True))
        rows.append(row)
    by_model = {row["model"]: row for row in rows}
    found["models"] = rows
    for model, suffix in ((JUDGED, ""), (TUNED, "_tuned")):
        if model in by_model:
            for metric in ("auc", "logloss"):
                found[f"{metric}_vs_lightgbm{suffix}"] = by_model[model][metric] - by_model["LightGBM"][metric]
    return found


def main() -> None:
    """Run the logs that are asked for."""
    options = study(__doc__, tuple(LOGS))
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only or LOGS:
            options.update("real_logs.json", {name: evidence(name, options, Path(scratch))})


if __name__ == "__main__":
    main()
