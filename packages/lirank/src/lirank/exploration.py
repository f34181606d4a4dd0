"""Exploration on a run, as the commands have it: fit the belief about its last layer, judge policies on a log."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from lirank.data.batch import label_values
from lirank.data.ordering import closed_early
from lirank.data.parquet import ParquetLog
from lirank.explore.policies import first_place_probabilities
from lirank.explore.run import (
    Explorer,
    Logged,
    choice_probabilities,
    fit_posterior,
    judge,
    last_features,
    save_for,
    task_of,
)
from lirank.schema.columns import as_float, column_of
from lirank.schema.features import column
from lirank.schema.hashing import fingerprints
from lirank.train.run import TrainedModel, part_rows
from lirank.workflow import extended_rows, rows_in_order

Choice = Literal["best", "softmax", "ucb", "thompson"]


@dataclass(frozen=True)
class Policy:
    """A policy on a run's scores.

    Attributes:
        kind: `best` takes the highest score; `softmax` draws by exp(logit / temperature); `ucb` takes the highest mean
            plus `alpha` standard deviations; `thompson` the highest score under a draw of the posterior.
        temperature: Of `softmax`, in logits.
        alpha: Standard deviations of `ucb`.
        draws: Posterior draws per request of `thompson`.
        posterior: What `lirank explore fit` wrote, for `ucb` and `thompson`.
    """

    kind: Choice = "best"
    temperature: float = 1.0
    alpha: float = 1.0
    draws: int = 1000
    posterior: Path | None = None

    def __post_init__(self) -> None:
        """Refuse a policy without what it needs."""
        if self.posterior is None and self.kind in {"ucb", "thompson"}:
            raise ValueError(f"posterior: expected one for {self.kind} (see `lirank explore fit`)")
        if self.posterior is not None and self.kind not in {"ucb", "thompson"}:
            raise ValueError(f"posterior: {self.kind} uses none")


@dataclass(frozen=True)
class Columns:
    """Columns of a log of requests, one row per candidate.

    Attributes:
        request: Tells requests apart.
        shown: 1 for the candidate that was shown, one per request.
        propensity: Probability with which it was shown; read where shown.
    """

    request: str
    shown: str
    propensity: str


def fit_run_posterior(
    folder: Path,
    logs: Path | None,
    out: Path,
    *,
    label: str = "",
    precision: float = 1.0,
    start: Path | None = None,
    keep: float = 1.0,
) -> dict[str, Any]:
    """Fit the belief about the last layer of a run, and save it.

    Args:
        folder: The run.
        logs: Rows from after its training; None for its own training rows.
        out: File for the posterior.
        label: Label to explore; empty for the first.
        precision: Precision of the prior around the trained head.
        start: Posterior to go on from; None starts at the prior.
        keep: Share of its evidence that stays.

    Returns:
        Events seen, weights, the label, and the mean standard deviation of a logit on the run's sample.

    Raises:
        ValueError: If there are no rows, or the posterior is of another run.
    """
    trained = TrainedModel.load(folder)
    task = task_of(trained, label)
    name = trained.encoder.schema.labels[task].name
    begin = None
    if start is not None:
        explorer = Explorer.open(trained, folder, start)
        if explorer.task != task:
            raise ValueError(f"{start}: a posterior of another label than {name}")
        begin = explorer.posterior
    if logs is None:
        if start is not None:
            raise ValueError("LOGS: expected new rows to add to a posterior")
        log = part_rows(folder, "train")
        if log is None:
            raise ValueError(f"{folder}: the run has no training rows; name LOGS")
        source = pieces = log.read()
    else:
        opened = ParquetLog.open(logs)
        opened.require(trained.encoder.schema.columns())
        source = rows_in_order(opened, trained.encoder.schema, "")
        pieces = (extended_rows(trained, piece) for piece in source)
    with closed_early(source):
        posterior, events = fit_posterior(trained, pieces, task, precision=precision, posterior=begin, keep=keep)
    save_for(posterior, out, folder, name)
    deviation = None
    if trained.sample is not None:
        phi = last_features(trained.model, trained.encoder.encode(trained.sample), task)
        deviation = float(posterior.variance(phi).sqrt().mean())
    return {"events": events, "weights": len(posterior.mean), "label": name, "deviation": deviation}


def estimate_policy(
    folder: Path,
    logs: Path,
    columns: Columns,
    policy: Policy,
    *,
    label: str = "",
    clip: float = float("inf"),
    seed: int = 0,
) -> dict[str, Any]:
    """What a policy on a run's scores would have earned on the requests that another policy logged.

    Histories and popularity are those at the end of the run's training, for every request.

    Args:
        folder: The run.
        logs: Rows from after its training, one per candidate; labels are read where shown.
        columns: Columns of requests, of what was shown, and of propensities.
        policy: The policy.
        label: Label that is the reward; empty for the first.
        clip: Largest weight.
        seed: Seed of the draws.

    Returns:
        `requests`, `candidates`, `logged` (the mean reward of the logging policy) and `estimates` by estimator.

    Raises:
        ValueError: If the log and the schema disagree.
    """
    trained = TrainedModel.load(folder)
    schema = trained.encoder.schema
    task = task_of(trained, label)
    explorer = Explorer.open(trained, folder, policy.posterior) if policy.posterior else None
    if explorer is not None and explorer.task != task:
        raise ValueError(f"{policy.posterior}: a posterior of another label than {schema.labels[task].name}")
    scored = _scored(trained, ParquetLog.open(logs), columns, task, explorer)
    logged = Logged(scored["request"], scored["shown"] == 1, scored["reward"], scored["propensity"])
    chances = _chances(policy, scored, explorer, torch.Generator().manual_seed(seed))
    found = judge(logged, chances, scored["p"], clip=clip, cluster=scored.get("group"))
    return {
        "requests": int(logged.shown.sum()),
        "candidates": len(logged.shown),
        "logged": float(logged.reward[logged.shown].mean()),
        "estimates": {name: asdict(estimate) for name, estimate in found.items()},
    }


def _scored(
    trained: TrainedModel, log: ParquetLog, columns: Columns, task: int, explorer: Explorer | None
) -> dict[str, np.ndarray]:
    """Columns of a log of candidates, with probabilities and, for an explorer, the last hidden layer."""
    schema = trained.encoder.schema
    label = schema.labels[task]
    group = schema.feature(schema.group) if schema.group else None
    names = [*schema.serving_columns(), column(label), columns.request, columns.shown, columns.propensity]
    log.require(names)
    found: dict[str, list[np.ndarray]] = {}
    requests = []
    for table in log.read(list(dict.fromkeys(names))):
        batch = trained.encoder.encode(trained.causal.lookup(table), labels=False)
        shown = as_float(columns.shown, column_of(table, columns.shown))
        reward, chance = np.zeros(len(shown)), np.ones(len(shown))
        taken = table.filter(pa.array(shown == 1))
        reward[shown == 1] = label_values(label, taken)
        chance[shown == 1] = as_float(columns.propensity, column_of(taken, columns.propensity))
        piece = {
            "p": trained.model.predict(batch)[:, task].double().numpy(),
            "shown": shown,
            "reward": reward,
            "propensity": chance,
        }
        if group is not None:
            piece["group"] = fingerprints(column(group), column_of(table, column(group)), group.type)[0]
        if explorer is not None:
            piece["phi"] = last_features(trained.model, batch, task).numpy()
        for name, values in piece.items():
            found.setdefault(name, []).append(values)
        requests.append(column_of(table, columns.request))
    numbers = pa.chunked_array(requests).combine_chunks().dictionary_encode("encode")
    codes = np.asarray(numbers.indices).astype(np.int64)
    return {name: np.concatenate(pieces) for name, pieces in found.items()} | {"request": codes}


def _chances(
    policy: Policy, scored: dict[str, np.ndarray], explorer: Explorer | None, generator: torch.Generator
) -> np.ndarray:
    """Probability with which the policy takes each candidate."""
    requests = scored["request"]
    if explorer is None:
        logits = np.log(scored["p"]) - np.log1p(-scored["p"])
        kind: Literal["best", "softmax"] = "softmax" if policy.kind == "softmax" else "best"
        return choice_probabilities(requests, logits, kind, policy.temperature)
    phi = torch.from_numpy(scored["phi"])
    if policy.kind == "ucb":
        mean, variance = explorer.posterior.score(phi), explorer.posterior.variance(phi)
        return choice_probabilities(requests, (mean + policy.alpha * variance.sqrt()).numpy(), "best")
    chances = np.zeros(len(requests))
    for rows in np.split(np.argsort(requests, kind="stable"), np.bincount(requests).cumsum()[:-1]):
        found = first_place_probabilities(explorer.posterior, phi[torch.from_numpy(rows)], policy.draws, generator)
        chances[rows] = found.numpy()
    return chances
