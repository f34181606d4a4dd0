"""What the commands do, as functions: train a run, evaluate it, and set baselines beside it."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from core_tensor.app.cli import progress
from core_tensor.app.extras import require
from core_tensor.app.ranks import ALONE, Ranks

from lirank.data.batch import Batch
from lirank.data.ordering import closed_early, in_time_order
from lirank.data.parquet import ParquetLog
from lirank.data.split import Split
from lirank.distributed.tables import ShardedTable
from lirank.evaluate import baseline
from lirank.evaluate.compare import compare
from lirank.evaluate.metrics import auc_interval, report
from lirank.features.delayed import settle
from lirank.features.prepare import Earlier, Prepared, prepare
from lirank.model.config import ModelConfig
from lirank.model.growth import grown
from lirank.model.ranker import Ranker
from lirank.schema.columns import column_of, decoded
from lirank.schema.features import Schema
from lirank.serve import deploy
from lirank.train import checkpoint
from lirank.train.incremental import Start, accumulate, hand_over, known, prior_of
from lirank.train.loop import BEST, TrainConfig, Trainer
from lirank.train.loop import evaluate as evaluate_log
from lirank.train.run import CURVATURE, DATA, SAMPLE, SAMPLE_ROWS, TrainedModel, part_rows

_SEGMENTS, _DAY = 20, 86_400.0


def train_run(
    log: ParquetLog,
    schema: Schema,
    split: Split,
    config: ModelConfig,
    training: TrainConfig,
    folder: Path,
    *,
    start: Start | None = None,
    now: int | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Prepare a log, train on it, save the model, and measure it.

    Args:
        log: The log.
        schema: The schema.
        split: How to divide the log.
        config: The network.
        training: How to train.
        folder: The run's folder; what an earlier process left there is continued.
        start: An earlier run to go on from, whose network stays the network; None trains from nothing. Every process
            then has the whole table, whose rows are shared out otherwise.
        now: Time of the log's export, for labels that arrive later; None takes the latest time in the log.
        ranks: Processes that share the batches and the rows of the table; all see the same folder.

    Returns:
        Rows of each part, notes, epochs, and metrics of the validation and test rows; of a run that goes on from
        another, also the metrics of that other one on the same test rows, as `before`.

    Raises:
        ValueError: If the log and the schema disagree.
    """
    earlier = TrainedModel.load(start.run) if start else None
    if ranks.first:
        prepare_with_bar(log, schema, split, folder / DATA, hand_over(earlier) if earlier else None, now)
    ranks.barrier()
    prepared = prepare(log, schema, split, folder / DATA)  # it is there
    encoder = prepared.encoder()
    torch.manual_seed(training.seed)
    if earlier:
        model = grown(earlier.model, earlier.encoder, encoder)
    else:
        table = ShardedTable(encoder.layout.rows or 1, config.dim, ranks) if ranks.size > 1 else None
        model = Ranker(encoder, config, table)
    before = prior = None
    if start and earlier and start.prior:
        before = known(start.run, earlier, model, encoder, training.batch_size)
        prior = prior_of(start, before, model, encoder, training.batch_size)
    test = prepared.log("test")
    measured = evaluate_log(model, encoder, test) if earlier and test else None
    rows, valid = prepared.log("train"), prepared.log("valid")
    assert rows is not None
    total = training.epochs * -(-rows.rows // training.batch_size)
    nothing: list[None] = []
    with progress(nothing, "training", total=total, unit="step") as bar:
        trainer = Trainer(model, encoder, training, ranks, prior)
        epochs = trainer.fit(rows, valid, folder, lambda state: _advance(bar, state))
    if start and before:
        added = trainer.curvature(rows)  # by every process, as the model is the same everywhere
        if ranks.first:
            accumulate(folder, start, before, added)
    sample = next((test or valid or rows).read(rows=SAMPLE_ROWS))
    record = {"epochs": epochs, "until": prepared.until}
    if ranks.first:
        TrainedModel(_whole(trainer, folder), encoder, prepared.causal(), record, sample).save(folder)
    ranks.barrier()
    return {
        "rows": prepared.rows,
        "notes": prepared.notes,
        "epochs": [_flat(entry) for entry in epochs],
        "valid": evaluate_log(model, encoder, valid, ranks) if valid else None,
        "test": evaluate_log(model, encoder, test, ranks) if test else None,
    } | ({"before": measured} if start else {})


def _whole(trainer: Trainer, folder: Path) -> Ranker:
    """The trained model with all rows of its table in this process."""
    model = trainer.model
    if trainer.sharded:
        model = Ranker(trainer.encoder, trainer.model.config)
        tensors, _ = checkpoint.load_shared(folder / BEST, checkpoint.Shape(model.table.rows, 0, 0, ALONE))
        model.load_state_dict(tensors)
    return model.eval()


def _advance(bar: Any, state: dict[str, Any]) -> None:
    bar.n = state["epoch"] * state["steps"] + state["step"]
    bar.set_postfix(epoch=state["epoch"], loss=f"{state['loss']:.4f}", refresh=False)
    bar.update(0)


def _count(bar: Any, rows: int) -> None:
    bar.update(rows)


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    found = {"epoch": entry["epoch"], "train loss": entry["train_loss"]}
    for label, metrics in entry.get("valid", {}).items():
        found |= {f"{label} logloss": metrics["logloss"], f"{label} AUC": metrics["auc"]}
    return found


def prepare_with_bar(
    log: ParquetLog,
    schema: Schema,
    split: Split,
    folder: Path,
    earlier: Earlier | None = None,
    now: int | None = None,
) -> Prepared:
    """`lirank.features.prepare.prepare` with a progress bar."""
    nothing: list[None] = []
    with progress(nothing, "reading", total=log.rows, unit="row") as bar:
        return prepare(log, schema, split, folder, lambda rows: _count(bar, rows), earlier=earlier, now=now)


def evaluate_run(
    folder: Path, logs: Path | None, *, intervals: bool = False, by: str = "", against: Path | None = None
) -> dict[str, Any]:
    """Measure a run.

    Args:
        folder: The run's folder.
        logs: Rows from after its training; None for its own test rows.
        intervals: Whether the AUC gets a bootstrap interval.
        by: Column whose values are reported one by one.
        against: Another run, compared on the same rows.

    Returns:
        `labels`, and where asked for `segments` and `against`.
    """
    trained = TrainedModel.load(folder)
    scored = scored_rows(trained, folder, logs, by)
    found: dict[str, Any] = {"labels": {}}
    names = [label.name for label in trained.encoder.schema.labels]
    for t, name in enumerate(names):
        entry = report(scored["p"][:, t], scored["labels"][:, t], scored["group"], scored["weight"])
        if intervals and entry["auc"] is not None:
            known = ~np.isnan(scored["labels"][:, t])
            groups = None if scored["group"] is None else scored["group"][known]
            interval = auc_interval(scored["p"][known, t], scored["labels"][known, t], groups)
            if interval is not None:
                entry |= {"auc_low": interval.low, "auc_high": interval.high}
        found["labels"][name] = entry
    if by:
        values, counts = np.unique(scored["by"], return_counts=True)
        frequent = values[np.argsort(-counts, kind="stable")][:_SEGMENTS]
        found["segments"] = {
            str(value): {
                name: report(scored["p"][scored["by"] == value, t], scored["labels"][scored["by"] == value, t])
                for t, name in enumerate(names)
            }
            for value in frequent
        }
    if against is not None:
        found["against"] = _against(scored, TrainedModel.load(against), against, logs, names)
    return found


def _against(
    scored: dict[str, Any], other: TrainedModel, folder: Path, logs: Path | None, names: list[str]
) -> list[dict[str, Any]]:
    theirs = scored_rows(other, folder, logs, "")
    if not np.array_equal(theirs["labels"], scored["labels"], equal_nan=True):
        raise ValueError(f"{folder}: scored other rows than the first run; name LOGS that both can score")
    rows = []
    for t, name in enumerate(names):
        known = ~np.isnan(scored["labels"][:, t])
        groups = None if scored["group"] is None else scored["group"][known]
        result = compare(scored["p"][known, t], theirs["p"][known, t], scored["labels"][known, t], groups)
        for metric, interval in (("auc", result.auc), ("logloss", result.logloss)):
            rows.append(
                {
                    "label": name,
                    "metric": metric,
                    "difference": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                }
            )
    return rows


def scored_rows(trained: TrainedModel, folder: Path, logs: Path | None, by: str) -> dict[str, Any]:
    """Score raw rows, or the run's own test rows."""
    schema = trained.encoder.schema
    if logs is None:
        log = part_rows(folder, "test")
        if log is None:
            raise ValueError(f"{folder}: the run has no test rows; name LOGS")
    else:
        log = ParquetLog.open(logs)
        log.require([*schema.columns(), *([by] if by else [])])
    found: dict[str, list[np.ndarray]] = {"p": [], "labels": [], "group": [], "weight": [], "by": []}
    pieces = rows_in_order(log, schema, by) if logs is not None else log.read()
    with closed_early(pieces):  # a row that is refused leaves no sorted copy behind
        for piece in pieces:
            table = extended_rows(trained, piece) if logs is not None else piece
            batch = trained.encoder.encode(table)
            found["p"].append(trained.model.predict(batch).numpy())
            for name in ("labels", "group", "weight"):
                value = getattr(batch, name)
                if value is not None:
                    found[name].append(value.numpy())
            if by:
                log.require([by])
                found["by"].append(np.array(decoded(column_of(table, by)).to_pylist(), dtype=object).astype(str))
    return {name: np.concatenate(parts) if parts else None for name, parts in found.items()}


def extended_rows(trained: TrainedModel, piece: pa.Table) -> pa.Table:
    """Raw rows with settled labels and causal columns."""
    return trained.causal.extend(settle(piece, trained.encoder.schema, trained.causal.seconds))


def rows_in_order(log: ParquetLog, schema: Schema, by: str) -> Any:
    """Raw rows of a log in order of time, with the schema's columns and one more."""
    columns = list(dict.fromkeys([*schema.columns(), *([by] if by else [])]))
    if schema.time is None:
        yield from log.read(columns)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield from in_time_order(log, columns, schema.time.column, scratch)


def baselines(log: ParquetLog, schema: Schema, split: Split, seed: int = 0) -> dict[str, Any]:
    """Logistic regression and LightGBM on the rows and features that a model would get.

    Args:
        log: The log.
        schema: The schema.
        split: How to divide it.
        seed: Seed of both.

    Returns:
        By label, metrics of both and of the constant base rate.
    """
    for module in ("sklearn", "lightgbm"):
        require(module, baseline.EXTRA)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare_with_bar(log, schema, split, Path(scratch) / DATA)
        return prepared_baselines(prepared, seed)


def prepared_baselines(prepared: Prepared, seed: int = 0) -> dict[str, Any]:
    """`baselines` on prepared data."""
    encoder = prepared.encoder()
    logs = {part: prepared.log(part) for part in ("train", "valid", "test")}
    if logs["test"] is None or logs["train"] is None:
        raise ValueError("test: expected rows to test on")
    found = {}
    for t, label in enumerate(encoder.schema.labels):
        train, test = (baseline.load_rows(encoder, log, t) for log in (logs["train"], logs["test"]))
        valid = baseline.load_rows(encoder, logs["valid"], t) if logs["valid"] else None
        groups = None if test.batch.group is None else test.batch.group.numpy()
        linear = baseline.logistic_regression(encoder.layout, train, valid, test, seed)
        trees, setting = baseline.lightgbm(encoder.layout, train, valid, test, seed)
        rate = np.full(len(test.label), train.label.mean())
        found[label.name] = {
            "base rate": report(rate, test.label, groups, test.weight),
            "logistic regression": report(linear, test.label, groups, test.weight),
            "LightGBM": report(trees, test.label, groups, test.weight) | {"setting": setting},
        }
    return found


def calibrate_run(folder: Path, logs: Path | None, out: Path, method: Any = "auto") -> dict[str, Any]:
    """Recalibrate a run and save it as another.

    Args:
        folder: The run.
        logs: Rows from after its training, whose events are remembered too; None takes its own validation rows.
        out: Folder of the new run.
        method: See `lirank.evaluate.calibration.fit_curve`.

    Returns:
        What `lirank.serve.deploy.recalibrate` returns.

    Raises:
        ValueError: If there are no rows.
    """
    trained = TrainedModel.load(folder)
    encoder = trained.encoder
    found: dict[str, list[np.ndarray]] = {"logits": [], "labels": []}
    if logs is None:
        log = part_rows(folder, "valid")
        source = log.read() if log else iter(())
        pieces = source
    else:
        opened = ParquetLog.open(logs)
        opened.require(encoder.schema.columns())
        source = rows_in_order(opened, encoder.schema, "")
        pieces = (extended_rows(trained, piece) for piece in source)
    with closed_early(source):
        for table in pieces:
            batch = encoder.encode(table)
            with torch.no_grad():
                vectors = trained.model.vectors(batch)
                logits = trained.model.network(vectors, None, calibrate=False)
            if vectors.context is not None:
                found.setdefault("context", []).append(vectors.context.numpy())
            found["logits"].append(logits.numpy())
            found["labels"].append(batch.labels.numpy())  # type: ignore[union-attr]
    if not found["logits"]:
        raise ValueError(f"{folder}: the run has no validation rows; name LOGS")
    result = deploy.recalibrate(trained, {name: np.concatenate(parts) for name, parts in found.items()}, method)
    trained.save(out)
    return result


def sample(folder: Path) -> tuple[TrainedModel, Batch]:
    """A run and the rows that it keeps for comparisons: held-out ones where there are some."""
    trained = TrainedModel.load(folder)
    if trained.sample is None:
        raise ValueError(f"{folder}: expected {SAMPLE} of `lirank train` in it")
    return trained, trained.encoder.encode(trained.sample)


def evict_run(folder: Path, out: Path, unseen_for: float | None, keep: dict[str, int]) -> dict[str, Any]:
    """Take rows from ids that are stale or infrequent, and save the rest as another run.

    Args:
        folder: The run.
        out: Folder of the smaller run.
        unseen_for: Days: ids and keys that were last met longer before the end of the log are forgotten; None for none.
        keep: For features of static vocabularies how many ids keep their rows, the most frequent ones.

    Returns:
        `features`: by name, rows that became free and what `Vocabulary.summary` says now; `causal`: keys that histories
        and popularity have forgotten.

    Raises:
        ValueError: If the run's log had no times, or a feature is not an id feature of a static vocabulary.
    """
    trained = TrainedModel.load(folder)
    vocabularies, until = trained.encoder.vocabularies, trained.record.get("until")
    freed = dict.fromkeys(vocabularies, 0)
    forgotten = 0
    for name, count in keep.items():
        if name not in vocabularies:
            raise ValueError(f"{name}: expected an id feature ({', '.join(vocabularies)})")
        freed[name] += len(vocabularies[name].evict(count))
    if unseen_for is not None:
        if until is None:
            raise ValueError(f"{folder}: its log had no times, so nothing is known to be stale")
        before = until - round(unseen_for * _DAY / trained.causal.seconds)
        for name, vocabulary in vocabularies.items():
            freed[name] += len(vocabulary.forget(before))
        forgotten = trained.causal.forget(before)
    trained.save(out)
    if (folder / CURVATURE).exists():
        shutil.copyfile(folder / CURVATURE, out / CURVATURE)
    return {
        "features": {name: {"rows_freed": freed[name]} | v.summary() for name, v in vocabularies.items()},
        "causal": forgotten,
    }
