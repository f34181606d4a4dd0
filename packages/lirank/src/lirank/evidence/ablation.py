"""Does a component help? Each is tried on logs of the generator: where it should win, and where it has nothing to win.

A component comes with the market whose knob gives it something to learn. Both models see the same rows, the same seed
and the same number of epochs; the difference is judged on the last tenth of the time, by a paired bootstrap over users.
Beside it stands the share of the gap between logistic regression and the truth (the AUC of the true probabilities) that
each closes. Judged by `auc`, or by `rmse`: the root mean square error of the probability of the first position.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow.parquet as pq

from lirank.data.parquet import ParquetLog
from lirank.data.split import Split
from lirank.evaluate import baseline
from lirank.evaluate.compare import compare
from lirank.evaluate.metrics import auc, logloss
from lirank.evidence.generator import Generated, Market, generate, schema_of, without
from lirank.features.prepare import prepare
from lirank.model.config import ModelConfig
from lirank.schema.features import History, Id, Popularity, Schema
from lirank.train.loop import TrainConfig
from lirank.train.run import DATA, TrainedModel
from lirank.workflow import scored_rows, train_run

BASE = ModelConfig(cross="low_rank", widths=(64, 32), dim=8)
SPLIT = Split("time", 0.1, 0.1)
TRAINING = TrainConfig(epochs=10, batch_size=256, patience=2)


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
        folder: Scratch folder.
        market: Size and further knobs of the market; None for its defaults.
        training: How both are trained.
        null: Turn the component's knob to 0: it should neither help nor hurt.

    Returns:
        `component`, `seed`, `null`, `rows` (tested), `bayes` (AUC of the truth), `linear` (logistic regression's),
        for `on` and `off` the AUC, logloss, RMSE and share of the gap closed, and `difference`, on minus off by what
        the component is judged by; `auc_difference` has the ends of its 95 % interval.
    """
    size = market or Market(ids=0.5)
    knobs: dict[str, Any] = dict.fromkeys(component.knob, 0.0) if null else dict(component.knob)
    made = generate(dataclasses.replace(size, **knobs, seed=seed))
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(made.log, folder / "log.parquet")
    log = ParquetLog.open(folder / "log.parquet")
    training = msgspec.structs.replace(training, seed=seed)
    schema = schema_of(made.market, history=True) if History in component.hidden else made.schema
    schema = without(schema, *component.hidden_from_both) if component.hidden_from_both else schema
    schemas = {"on": schema, "off": _without(component, schema)}
    if component.positions:
        schemas = {
            "on": msgspec.structs.replace(made.schema, position="position"),
            "off": msgspec.structs.replace(made.schema, position=""),
        }
    scored = {}
    for side, config in (("on", component.on), ("off", component.off)):
        train_run(log, schemas[side], SPLIT, config, training, folder / side)
        found = scored_rows(TrainedModel.load(folder / side), folder / side, None, "")
        scored[side] = {**found, "p": found["p"][:, 0].astype(np.float64), "y": found["labels"][:, 0]}
    labels = scored["on"]["y"]
    shown, first = _truth(made, labels)
    linear = _linear(log, schemas["off"], folder, seed)
    bayes = auc(shown, labels)
    row: dict[str, Any] = {
        "component": component.name,
        "seed": seed,
        "null": null,
        "rows": len(labels),
        "bayes": bayes,
        "linear": linear,
    }
    for side in ("on", "off"):
        p = scored[side]["p"]
        value = auc(p, labels)
        assert value is not None  # both classes are there
        assert bayes is not None
        row[side] = {
            "auc": value,
            "logloss": logloss(p, labels),
            "rmse": float(np.sqrt(np.mean((p - first) ** 2))),
            "gap_closed": (value - linear) / (bayes - linear) if bayes > linear else None,
        }
    result = compare(scored["on"]["p"], scored["off"]["p"], labels, scored["on"]["group"])
    row["auc_difference"] = {"value": result.auc.value, "low": result.auc.low, "high": result.auc.high}
    row["judge"] = component.judge
    row["difference"] = row["on"][component.judge] - row["off"][component.judge]
    return row


def _without(component: Component, schema: Schema) -> Schema:
    """What the model without the component sees."""
    smaller = without(schema, *component.hidden) if component.hidden else schema
    features = tuple(
        msgspec.structs.replace(f, rows=4) if isinstance(f, Id) and f.name in component.coarse else f
        for f in smaller.features
    )
    return msgspec.structs.replace(smaller, features=features)


def _truth(made: Generated, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability as shown, and in the first position, of the test rows, which are the log's last ones."""
    label = made.schema.labels[0].name
    n = len(labels)
    if not np.array_equal(made.log[label].to_numpy()[-n:], labels):
        raise ValueError("test: expected the last rows of the log")
    p, logged = made.truth[label].to_numpy()[-n:], made.log["position"].to_numpy()[-n:]
    return p, p * (1.0 + logged) ** made.market.position


def _linear(log: ParquetLog, schema: Schema, folder: Path, seed: int) -> float:
    """AUC of logistic regression on the features that the model without the component sees."""
    prepared = prepare(log, schema, SPLIT, folder / "off" / DATA)
    encoder = prepared.encoder()
    rows = {
        part: baseline.load_rows(encoder, found) for part in ("train", "valid", "test") if (found := prepared.log(part))
    }
    scores = baseline.logistic_regression(encoder.layout, rows["train"], rows.get("valid"), rows["test"], seed)
    value = auc(scores, rows["test"].label)
    assert value is not None
    return value


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
