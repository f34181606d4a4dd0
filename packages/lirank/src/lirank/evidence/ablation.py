"""Does a component help? Each is tried on logs of the generator: where it should win, and where it has nothing to win.

A component comes with the market whose knob gives it something to learn. Both models see the same rows, the same seed
and the same number of epochs; the difference is judged on the last part of the time, by a paired bootstrap over users.
Beside it stands the share of the gap between logistic regression and the truth (the AUC of the true probabilities) that
each closes. Judged by `auc`, or by `rmse`: the root mean square error of the probability of the first position.

Scores of finished trainings lie in the folder that the functions are given, under a name made of everything that
decides them: components share models, and a killed study goes on where it was.
"""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import numpy as np
import pyarrow.parquet as pq
import torch
from core_tensor.app.files import atomic_path, digest

from lirank.data.parquet import ParquetLog
from lirank.data.split import Split
from lirank.evaluate import baseline
from lirank.evaluate.compare import compare
from lirank.evaluate.metrics import auc, logloss
from lirank.evidence.generator import Generated, Market, generate, schema_of, without
from lirank.features.prepare import Prepared, prepare
from lirank.model.config import ModelConfig
from lirank.model.ranker import Ranker
from lirank.schema.features import History, Id, Popularity, Schema
from lirank.train.loop import TrainConfig, Trainer, score

BASE = ModelConfig(cross="low_rank", widths=(64, 32), dim=8)
SPLIT = Split("time", 0.1, 0.4)
"""Scoring is cheap beside training, and a difference of 0.001 needs many tested rows."""
TRAINING = TrainConfig(epochs=6, batch_size=512, lr=3e-3, row_lr=3e-2, patience=2)
"""Rates chosen on a market of another seed: few steps need large ones."""
MARKET = Market(users=300, items=200, events=40_000, ids=0.5)


@dataclass(frozen=True)
class Component:
    """What is tried.

    Attributes:
        name: Its name.
        knob: The knob of the market that it answers to, with its value; empty for what every market has.
        on: The model with it.
        off: The model without it.
        hidden: Kinds of features that the model without it does not see.
        hidden_from_both: Kinds of features that neither sees, since they tell the same in another way.
        coarse: Ids that the model without it sees through four rows only.
        positions: Whether only the model with it sees positions.
        judge: What it should make better.
    """

    name: str
    knob: Mapping[str, float] = field(default_factory=dict)
    on: ModelConfig = BASE
    off: ModelConfig = BASE
    hidden: tuple[type, ...] = ()
    hidden_from_both: tuple[type, ...] = ()
    coarse: tuple[str, ...] = ()
    positions: bool = False
    judge: Literal["auc", "rmse"] = "auc"


def _with(**changes: Any) -> ModelConfig:
    return msgspec.structs.replace(BASE, **changes)


COMPONENTS = (
    Component("ids", {"ids": 1.5}, hidden_from_both=(Popularity,), coarse=("user", "item")),
    Component("popularity", {"ids": 1.0}, hidden=(Popularity,)),
    Component("history", {"history": 2.0}, hidden=(History,)),
    Component("low-rank DCN", {"crosses": 2.0}, off=_with(cross="none")),
    Component("Residual DCN beside low-rank DCN", {"crosses": 2.0}, on=_with(cross="residual")),
    Component("dense gate", {"crosses": 2.0}, on=_with(gate="dense")),
    Component("large MLP", {"crosses": 2.0}, on=_with(widths=(256, 256, 128))),
    Component("isotonic layer", {"calibration": 1.0}, on=_with(calibration="joint"), judge="rmse"),
    Component("position debiasing", {"position": 1.0}, positions=True, judge="rmse"),
)
"""The components of the paper that one model either has or has not."""


def ablate(
    component: Component,
    seed: int,
    folder: Path,
    *,
    market: Market | None = None,
    training: TrainConfig = TRAINING,
    null: bool = False,
) -> dict[str, Any]:
    """Train with and without a component on one generated log.

    Args:
        component: What is tried.
        seed: Seed of the log and of both trainings.
        folder: Where scores of finished trainings lie.
        market: Size and further knobs of the market; None for `MARKET`.
        training: How both are trained.
        null: Turn the component's knob to 0: it should neither help nor hurt.

    Returns:
        `component`, `seed`, `null`, `rows` (tested), `bayes` (AUC of the truth), `linear` (logistic regression's),
        for `on` and `off` the AUC, logloss, RMSE and share of the gap closed, and `difference`, on minus off by what
        the component is judged by; `auc_difference` has the ends of its 95 % interval.
    """
    knobs: dict[str, Any] = dict.fromkeys(component.knob, 0.0) if null else dict(component.knob)
    with _Study(dataclasses.replace(market or MARKET, **knobs, seed=seed), training, folder) as study:
        return _ablated(component, study, seed, null)


def _ablated(component: Component, study: "_Study", seed: int, null: bool) -> dict[str, Any]:
    made = study.made
    schema = schema_of(made.market, history=True) if History in component.hidden else made.schema
    schema = without(schema, *component.hidden_from_both) if component.hidden_from_both else schema
    schemas = {"on": schema, "off": _without(component, schema)}
    if component.positions:
        schemas = {
            "on": msgspec.structs.replace(made.schema, position="position"),
            "off": msgspec.structs.replace(made.schema, position=""),
        }
    p = {side: study.network(schemas[side], getattr(component, side)) for side in ("on", "off")}
    row: dict[str, Any] = {
        "component": component.name,
        "seed": seed,
        "null": null,
        "rows": len(study.labels),
        "bayes": study.auc(study.truth),
        "linear": study.auc(study.linear(schemas["off"])),
    }
    for side in ("on", "off"):
        row[side] = {
            "auc": study.auc(p[side]),
            "logloss": logloss(p[side], study.labels),
            "rmse": float(np.sqrt(np.mean((p[side] - study.first) ** 2))),
            "gap_closed": _gap(study.auc(p[side]), row["linear"], row["bayes"]),
        }
    result = compare(p["on"], p["off"], study.labels, study.users, draws=200).auc
    row["auc_difference"] = {"value": result.value, "low": result.low, "high": result.high}
    row["judge"] = component.judge
    row["difference"] = row["on"][component.judge] - row["off"][component.judge]
    return row


FULL_MARKET = dataclasses.replace(MARKET, ids=0.8, crosses=1.0, history=2.0, calibration=0.5)
"""Every component has something to learn."""

FULL_MODELS: Mapping[str, tuple[ModelConfig, tuple[type, ...]]] = {
    "MLP": (_with(cross="none"), (History,)),
    "low-rank DCN + MLP (base)": (BASE, (History,)),
    "base without popularity": (BASE, (History, Popularity)),
    "base + Residual DCN": (_with(cross="residual"), (History,)),
    "base + dense gate": (_with(gate="dense"), (History,)),
    "base + large MLP": (_with(widths=(256, 256, 128)), (History,)),
    "base + isotonic layer": (_with(calibration="joint"), (History,)),
    "base + history": (BASE, ()),
    "full model": (_with(cross="residual", gate="dense", calibration="joint"), ()),
}
"""Networks by name, each with the kinds of features that it does not see."""


def gap_closed(
    seed: int, folder: Path, *, market: Market = FULL_MARKET, training: TrainConfig = TRAINING
) -> dict[str, dict[str, float | None]]:
    """What models close of the gap between logistic regression and the truth, where everything matters.

    Logistic regression and LightGBM, tuned on the validation rows, see ids, numbers and popularity.

    Args:
        seed: Seed of the log and of all trainings.
        folder: Where scores of finished trainings lie.
        market: Size and knobs of the market.
        training: How the networks are trained.

    Returns:
        By model, `auc`, `logloss` and `gap_closed`; `truth` has the true probabilities.
    """
    with _Study(dataclasses.replace(market, seed=seed), training, folder) as study:
        schema = schema_of(study.made.market, history=True)
        plain = without(schema, History)
        scores = {"logistic regression": study.linear(plain), "LightGBM": study.trees(plain)}
        scores |= {name: study.network(without(schema, *h), config) for name, (config, h) in FULL_MODELS.items()}
        scores["truth"] = study.truth
    low, high = study.auc(scores["logistic regression"]), study.auc(study.truth)
    return {
        name: {
            "auc": study.auc(p),
            "logloss": logloss(p, study.labels),
            "gap_closed": _gap(study.auc(p), low, high),
        }
        for name, p in scores.items()
    }


def _gap(value: float, low: float, high: float) -> float | None:
    return (value - low) / (high - low) if high > low else None


class _Study:
    """One generated log, and scores of models on its test rows, which are its last ones."""

    def __init__(self, market: Market, training: TrainConfig, folder: Path) -> None:
        self.made, self.folder = _generated(market), folder
        self.training = msgspec.structs.replace(training, seed=market.seed)
        self._temporary = tempfile.TemporaryDirectory()
        self.work = Path(self._temporary.name)
        times = self.made.log["time"].to_numpy()
        n = int((times >= times[round(len(times) * (1 - SPLIT.test))]).sum())
        self.labels = self._last(self.made.log, market.label, n).astype(np.float64)
        self.users = self._last(self.made.log, "user", n)
        self.truth = self._last(self.made.truth, market.label, n)
        self.first = self.truth * (1.0 + self._last(self.made.log, "position", n)) ** market.position

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._temporary.cleanup()

    @staticmethod
    def _last(table: Any, name: str, n: int) -> np.ndarray:
        column: np.ndarray = table[name].to_numpy()[-n:]
        return column

    def auc(self, p: np.ndarray) -> float:
        """AUC on the test rows."""
        found = auc(p, self.labels)
        assert found is not None  # both classes are there
        return found

    def network(self, schema: Schema, config: ModelConfig) -> np.ndarray:
        """Probabilities of a trained network, shape (n,)."""
        return self._scored((schema.to_yaml(), config.to_dict(), self.training.to_dict()), self._train, schema, config)

    def linear(self, schema: Schema) -> np.ndarray:
        """Probabilities of logistic regression."""
        return self._scored((schema.to_yaml(), "linear"), self._baseline, schema, baseline.logistic_regression)

    def trees(self, schema: Schema) -> np.ndarray:
        """Probabilities of LightGBM."""
        return self._scored((schema.to_yaml(), "trees"), self._baseline, schema, baseline.lightgbm)

    def _scored(self, key: Any, make: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
        path = self.folder / f"{digest(repr((self.made.market, SPLIT, key)))[:20]}.npy"
        if not path.exists():
            p = make(*arguments)
            with atomic_path(path) as temporary:
                np.save(temporary, p)
        found: np.ndarray = np.load(path, allow_pickle=False)
        return found

    def _prepared(self, schema: Schema) -> Prepared:
        log = self.work / "log.parquet"
        if not log.exists():
            pq.write_table(self.made.log, log)
        return prepare(ParquetLog.open(log), schema, SPLIT, self.work / digest(schema.to_yaml())[:12])

    def _train(self, schema: Schema, config: ModelConfig) -> np.ndarray:
        prepared = self._prepared(schema)
        encoder, train, test = prepared.encoder(), prepared.log("train"), prepared.log("test")
        assert train is not None
        assert test is not None
        torch.manual_seed(self.training.seed)
        model = Ranker(encoder, config)
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            Trainer(model, encoder, self.training).fit(train, prepared.log("valid"), Path(scratch))
        return self._checked(score(model, encoder, test))

    def _checked(self, found: Mapping[str, Any]) -> np.ndarray:
        if not np.array_equal(found["labels"][:, 0], self.labels):
            raise ValueError("test: expected the last rows of the log")
        p: np.ndarray = found["p"][:, 0].astype(np.float64)
        return p

    def _baseline(self, schema: Schema, fit: Callable[..., Any]) -> np.ndarray:
        prepared = self._prepared(schema)
        encoder = prepared.encoder()
        logs = {part: prepared.log(part) for part in ("train", "valid", "test")}
        rows = {part: baseline.load_rows(encoder, log) for part, log in logs.items() if log is not None}
        p = fit(encoder.layout, rows["train"], rows.get("valid"), rows["test"], self.training.seed)
        found: np.ndarray = p[0] if isinstance(p, tuple) else p
        return found


@functools.lru_cache(maxsize=2)
def _generated(market: Market) -> Generated:
    return generate(market)


def _without(component: Component, schema: Schema) -> Schema:
    """What the model without the component sees."""
    smaller = without(schema, *component.hidden) if component.hidden else schema
    features = tuple(
        msgspec.structs.replace(f, rows=4) if isinstance(f, Id) and f.name in component.coarse else f
        for f in smaller.features
    )
    return msgspec.structs.replace(smaller, features=features)


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per component: what it brought over the seeds, on its knob and on the null.

    Args:
        rows: Results of `ablate`.

    Returns:
        `component`, `judge`, `seeds`, mean and standard error of the difference on the knob, how many seeds it won, the
        share of the gap that both close, and the mean difference and standard error on the null.
    """
    found = []
    listed = list(rows)
    for name in dict.fromkeys(row["component"] for row in listed):
        mine = [row for row in listed if row["component"] == name and not row["null"]]
        null = [row for row in listed if row["component"] == name and row["null"]]
        judge = (mine or null)[0]["judge"]
        sign = 1 if judge == "auc" else -1
        entry = {
            "component": name,
            "judge": judge,
            "seeds": len(mine),
            **_mean("difference", [row["difference"] for row in mine]),
            "won": sum(sign * row["difference"] > 0 for row in mine),
            "gap_on": _average([row["on"]["gap_closed"] for row in mine]),
            "gap_off": _average([row["off"]["gap_closed"] for row in mine]),
            **_mean("null", [row["difference"] for row in null]),
        }
        found.append(entry)
    return found


def _mean(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard error, by name."""
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return {name: float(np.mean(values)) if n else None, f"{name}_se": error}


def _average(values: Sequence[float | None]) -> float | None:
    """Mean of what is known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
