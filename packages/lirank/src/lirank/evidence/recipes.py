"""The paper's three deployments, end to end on logs of the generator: what to read before building one's own.

`feed` ranks posts by a weighted sum of click, long dwell, like, comment and share, its tasks in two groups. `jobs`
ranks search results and recommendations by applications and qualified ones, with experts, while new jobs keep coming.
`ads` predicts rare chargeable clicks that are paid for by their probability, from sampled negatives, and explores:
Thompson sampling on the last layer, with the propensities that an off-policy estimate needs afterwards.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lirank.data.parquet import ParquetLog
from lirank.data.split import Split
from lirank.evidence.generator import ADS, FEED, JOBS, Generated, Market, generate
from lirank.explore.estimators import LoggedEvents, doubly_robust, ips, snips
from lirank.explore.policies import first_place_probabilities
from lirank.explore.posterior import LogisticPosterior
from lirank.features.dwell import DwellLabeler
from lirank.model.config import ModelConfig
from lirank.schema.features import Label, Schema
from lirank.train.loop import TrainConfig
from lirank.train.run import TrainedModel, part_rows
from lirank.workflow import evaluate_run, scored_rows, train_run

FEED_WEIGHTS = {"click": 1.0, "long_dwell": 2.0, "like": 3.0, "comment": 6.0, "share": 8.0}
"""What each action is worth to the feed."""
_DAY = 86_400
_CANDIDATES = 10
_DRAWS = 200


@dataclass(frozen=True)
class Recipe:
    """A deployment.

    Attributes:
        market: The log.
        model: The network.
        extend: Makes labels that the log does not have: `(log, schema) -> (log, schema)`.
        judge: What the deployment looks at: `(folder, generated) -> figures`.
    """

    market: Market
    model: ModelConfig
    extend: Callable[[pa.Table, Schema], tuple[pa.Table, Schema]]
    judge: Callable[[Path, Generated], dict[str, Any]]


def run_recipe(
    name: str, folder: Path, *, events: int = 100_000, seed: int = 0, training: TrainConfig | None = None
) -> dict[str, Any]:
    """Generate, label, train, and judge.

    Args:
        name: `feed`, `jobs` or `ads`.
        folder: Where log and run go.
        events: Impressions of the log.
        seed: Seed of log and training.
        training: How to train; None for the defaults.

    Returns:
        Metrics of the test rows by label, and what the deployment looks at.
    """
    recipe = RECIPES[name]
    users, items = max(events // 80, 20), max(events // 200, 20)
    made = generate(dataclasses.replace(recipe.market, events=events, users=users, items=items, seed=seed))
    log, schema = recipe.extend(made.log, made.schema)
    pq.write_table(log, folder / "log.parquet", row_group_size=8192)
    schema.save(folder / "schema.yaml")
    run = folder / "run"
    run.mkdir(exist_ok=True)
    training = training or TrainConfig(batch_size=512, seed=seed)
    result = train_run(
        ParquetLog.open(folder / "log.parquet"), schema, Split("time", 0.1, 0.1), recipe.model, training, run
    )
    return {"recipe": name, "rows": result["rows"], "test": result["test"], **recipe.judge(run, made)}


def _as_it_is(log: pa.Table, schema: Schema) -> tuple[pa.Table, Schema]:
    return log, schema


# ----------------------------------------------------------------------------------------------------------------------
# Feed


def with_long_dwell(log: pa.Table, schema: Schema) -> tuple[pa.Table, Schema]:
    """Add the long-dwell label, each day by the thresholds of the days before, and put the tasks into two groups.

    Args:
        log: A log with `time`, `dwell`, `device` and `category`, in order of time.
        schema: Its schema.

    Returns:
        Both with the label `long_dwell`, which is null on the first day.
    """
    day = pc.divide(pc.subtract(log["time"], log["time"][0]), _DAY).to_numpy()
    labeler, pieces = DwellLabeler(("device", "category"), quantile=0.9), []
    for start, stop in zip(*_runs(day), strict=True):
        rows = log.slice(start, stop - start)
        pieces.append(labeler.label(rows) if labeler.counts else pa.nulls(rows.num_rows, pa.int8()))
        labeler.fade(0.9)
        labeler.add(rows)
    contribution = {"like", "comment", "share"}
    labels = tuple(
        msgspec.structs.replace(label, group="contribution" if label.name in contribution else "click")
        for label in schema.labels
    )
    labels = (labels[0], Label(name="long_dwell", missing="skip", group="click"), *labels[1:])
    return log.append_column("long_dwell", pa.chunked_array(pieces)), msgspec.structs.replace(schema, labels=labels)


def _runs(values: np.ndarray) -> tuple[list[int], list[int]]:
    """Starts and ends of runs of equal values."""
    ends = [*(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [0, *ends[:-1]], ends


def _judge_feed(run: Path, made: Generated) -> dict[str, Any]:
    """How much of the value that a perfect ranking of each user's posts would have, the weighted sum brings."""
    trained = TrainedModel.load(run)
    scored = scored_rows(trained, run, None, "")
    names = [label.name for label in trained.encoder.schema.labels]
    score = final_score({name: scored["p"][:, t] for t, name in enumerate(names)}, FEED_WEIGHTS)
    n = len(score)
    truth = {name: made.truth[name].to_numpy()[-n:] for name in made.truth.column_names}
    gain = final_score(truth, {name: FEED_WEIGHTS[name] for name in truth})
    clicks = scored["p"][:, names.index("click")]
    return {
        "value_share_weighted_sum": value_share(score, gain, scored["group"]),
        "value_share_click_only": value_share(clicks, gain, scored["group"]),
    }


def final_score(probabilities: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The score that a feed sorts by, a weighted sum of the tasks' probabilities.

    Args:
        probabilities: Probabilities of each task, shape (n,).
        weights: What each task is worth; the same names.

    Returns:
        Scores, shape (n,).

    Raises:
        ValueError: If the names differ.
    """
    if probabilities.keys() != weights.keys():
        raise ValueError(f"weights: expected {', '.join(probabilities)}, got {', '.join(weights)}")
    terms = [weights[name] * value.astype(np.float64) for name, value in probabilities.items()]
    total: np.ndarray = np.sum(terms, axis=0)
    return total


def value_share(score: np.ndarray, gain: np.ndarray, groups: np.ndarray) -> float:
    """What showing each group its best-scored row gains, from 0 (a random row) to 1 (the best row).

    Args:
        score: Scores, shape (n,).
        gain: Expected value of showing a row, shape (n,).
        groups: Rows that compete, such as those of a user, shape (n,).

    Returns:
        The share, over groups of at least two rows; NaN where all rows gain the same.
    """
    order = np.lexsort((score, groups))
    starts, ends = _runs(groups[order])
    chosen = mean = best = 0.0
    for start, stop in zip(starts, ends, strict=True):
        if stop - start > 1:
            mine = gain[order[start:stop]]
            chosen, mean, best = chosen + mine[-1], mean + mine.mean(), best + mine.max()
    return float((chosen - mean) / (best - mean)) if best > mean else float("nan")


# ----------------------------------------------------------------------------------------------------------------------
# Jobs


def _judge_jobs(run: Path, made: Generated) -> dict[str, Any]:
    """Search and recommendation apart, and jobs that training never saw."""
    by_surface = evaluate_run(run, None, by="surface")["segments"]
    scored = scored_rows(TrainedModel.load(run), run, None, "")
    n = len(scored["p"])
    seen = set(made.log["item"].to_pylist()[: -2 * n])
    new = ~np.isin(made.log["item"].to_numpy()[-n:], list(seen))
    return {
        "auc_by_surface": {name: entry["apply"]["auc"] for name, entry in by_surface.items()},
        "new_jobs_share": float(new.mean()),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Ads


def _judge_ads(run: Path, made: Generated) -> dict[str, Any]:
    """Probabilities against the truth, and what exploration logs can say about another policy."""
    trained = TrainedModel.load(run)
    test = part_rows(run, "test")
    assert test is not None  # a recipe's split has test rows
    batch = trained.encoder.encode(next(iter(test.read(rows=1 << 20))))
    p = trained.model.predict(batch)[:, 0].double().numpy()
    logged = made.log["position"].to_numpy()[-len(p) :]
    first = made.truth["click"].to_numpy()[-len(p) :] * (1.0 + logged) ** made.market.position
    return {
        "mean_predicted": float(p.mean()),
        "mean_true": float(first.mean()),
        "rmse_to_truth": float(np.sqrt(np.mean((p - first) ** 2))),
        "exploration": _explore(trained, batch, torch.from_numpy(first)),
    }


@torch.no_grad()
def _explore(trained: TrainedModel, batch: Any, truth: Tensor) -> dict[str, Any]:
    """Log Thompson sampling on requests of ten ads, then estimate from its log what the greedy policy would earn."""
    generator = torch.Generator().manual_seed(0)
    hidden = trained.model.network.features(trained.model.vectors(batch)).double()
    hidden = torch.cat([hidden, torch.ones(len(hidden), 1, dtype=torch.float64)], 1)
    offset = torch.logit(trained.model.predict(batch)[:, 0].double().clamp(1e-6, 1 - 1e-6))
    half = len(hidden) // 2
    # 1. the belief about what the last layer has wrong, from the first half of the rows
    clicks = torch.bernoulli(truth[:half], generator=generator)
    belief = LogisticPosterior.prior(hidden.shape[1], 10.0).updated(hidden[:half], clicks, offset=offset[:half])
    # 2. requests of ten candidates from the other half; the offset rides on a feature whose weight is known to be 1
    count = (len(hidden) - half) // _CANDIDATES
    rows = (
        torch.randperm(len(hidden) - half, generator=generator)[: count * _CANDIDATES].view(count, _CANDIDATES) + half
    )
    scores = offset[rows] + hidden[rows] @ belief.mean
    greedy = scores.argmax(1)
    probabilities = torch.stack([_request(belief, hidden[r], offset[r], generator) for r in rows])
    chosen = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    every = torch.arange(count)
    reward = torch.bernoulli(truth[rows[every, chosen]], generator=generator)
    model = torch.sigmoid(scores)
    events = LoggedEvents(
        reward=reward,
        propensity=probabilities[every, chosen],
        probability=(chosen == greedy).double(),
        model_logged=model[every, chosen],
        model_policy=model[every, greedy],
    )
    found = {e.__name__: dataclasses.asdict(e(events)) for e in (ips, snips, doubly_robust)}
    return {
        "requests": count,
        "earned_by_thompson": float(truth[rows[every, chosen]].mean()),
        "earned_by_greedy": float(truth[rows[every, greedy]].mean()),
        "earned_at_random": float(truth[rows].mean()),
        "greedy_estimated": found,
    }


def _request(belief: LogisticPosterior, hidden: Tensor, offset: Tensor, generator: torch.Generator) -> Tensor:
    """Probability of each candidate to be shown first."""
    d = len(belief.mean)
    mean = torch.cat([belief.mean, torch.ones(1, dtype=torch.float64)])
    precision = torch.block_diag(belief.precision, torch.full((1, 1), 1e12, dtype=torch.float64))
    fixed = dataclasses.replace(belief, mean=mean, precision=precision, prior_mean=mean, prior_precision=precision)
    assert hidden.shape[1] == d
    return first_place_probabilities(fixed, torch.cat([hidden, offset[:, None]], 1), _DRAWS, generator)


RECIPES = {
    "feed": Recipe(FEED, ModelConfig(tasks="grouped", task_widths=(32,)), with_long_dwell, _judge_feed),
    "jobs": Recipe(JOBS, ModelConfig(tasks="mmoe", task_widths=(32,)), _as_it_is, _judge_jobs),
    "ads": Recipe(ADS, ModelConfig(cross="residual", calibration="joint"), _as_it_is, _judge_ads),
}
"""The deployments by name."""
