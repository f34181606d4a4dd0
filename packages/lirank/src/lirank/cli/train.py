"""`lirank train`."""

from pathlib import Path
from typing import Any

import click
from core_tensor.app.cli import emit, json_option, out_option, overwrite_option, seed_option, table, threads_option

from lirank.cli.options import LOGS, logs_argument, schema_option, split_options

_PATH = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(epilog=LOGS)
@logs_argument
@schema_option(required=False, more="; by default that of --from")
@out_option("Folder of the run.", folder=True, required=True)
@click.option("--model", "model_file", type=click.Path(exists=True, path_type=Path), help="Network (YAML).")
@click.option("--from", "start", type=_PATH, help="Earlier run to continue, on newer LOGS.")
@click.option("--prior", type=click.FloatRange(0), default=1.0, help="Weight of what it learned; 0: plain warm start.")
@click.option("--cold", type=_PATH, help="Cold-start run that the prior keeps in mind too.")
@click.option("--cold-weight", type=click.FloatRange(0, 1), default=0.0, help="Share of --cold in the prior.")
@click.option("--remember", type=click.FloatRange(0, 1), default=0.9, help="Share of older curvature that stays.")
@click.option("--now", type=int, help="Time of the export, in LOGS' unit, for late labels. [default: latest in LOGS]")
@click.option("--epochs", type=click.IntRange(1), default=4, help="Most passes over the training rows.")
@click.option("--batch-size", type=click.IntRange(2), default=1024, help="Rows of a step.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=1e-3, help="Learning rate of the network.")
@click.option("--row-lr", type=click.FloatRange(0, min_open=True), default=1e-2, help="Learning rate of the table.")
@click.option("--row-optimizer", type=click.Choice(["adam", "adagrad"]), default="adam", help="Of the table.")
@click.option("--checkpoint-every", type=click.IntRange(0), default=0, help="Steps; 0 is one checkpoint per epoch.")
@split_options
@seed_option
@threads_option
@overwrite_option
@json_option
def train(
    logs: Path,
    schema_file: Path | None,
    out: Path,
    model_file: Path | None,
    start: Path | None,
    prior: float,
    cold: Path | None,
    cold_weight: float,
    remember: float,
    now: int | None,
    kind: str,
    valid: float,
    test: float,
    allow_future: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train on LOGS; the same command continues after a kill, to the same bytes.

    With --from, on rows after those of an earlier run: its ids, causal memory and weights are taken over, new ids
    and new features of --schema are added, and old weights move as far as its curvature lets them.

    Under `torchrun --nproc-per-node N -m lirank train ...` the processes share the batches and the rows of the table;
    a run can continue on another number of processes.
    """
    from core_tensor.app.files import digest
    from core_tensor.app.ranks import join
    from core_tensor.app.runs import RunFolder

    from lirank.data.parquet import ParquetLog
    from lirank.data.split import Split
    from lirank.model.config import ModelConfig, load_config
    from lirank.train.loop import TrainConfig
    from lirank.train.run import MODEL
    from lirank.workflow import train_run

    log = ParquetLog.open(logs)
    begin = _start(start, prior, cold, cold_weight, remember, model_file)
    schema = _schema(schema_file, start)
    split = Split(kind, valid, test, allow_future)  # type: ignore[arg-type]
    model, training = load_config(model_file) if model_file else ModelConfig(), TrainConfig(**options)
    inputs = {
        "data": log.digest,
        "schema": schema.to_yaml(),
        "split": split,
        "model": model.to_dict(),
        "train": training.to_dict(),
    }
    if begin:
        runs = {"from": digest(begin.run / MODEL), "cold": digest(begin.cold / MODEL) if begin.cold else ""}
        inputs["start"] = {**runs, "prior": prior, "cold_weight": cold_weight, "remember": remember}
    if now is not None:
        inputs["now"] = now
    with join() as ranks, RunFolder.claim(out, "lirank train", inputs, overwrite=overwrite, ranks=ranks) as run:
        result = run.result
        if result is None:
            result = train_run(log, schema, split, model, training, run.path, start=begin, now=now, ranks=ranks)
            run.finish(result)
        first = ranks.first
    if first:
        emit(result, as_json, lambda: summary(result))


def _schema(schema_file: Path | None, run: Path | None) -> Any:
    """The schema that was given, or that of the run to go on from."""
    from lirank.schema.features import load_schema
    from lirank.train.run import TrainedModel

    if schema_file:
        return load_schema(schema_file)
    if run:
        return TrainedModel.load(run).encoder.schema
    raise ValueError("--schema: expected the schema of LOGS (see `lirank schema infer`), or --from")


def _start(
    run: Path | None, prior: float, cold: Path | None, cold_weight: float, remember: float, model_file: Path | None
) -> Any:
    """Where the training starts; None for a cold start."""
    from lirank.train.incremental import Start

    if run is None:
        if cold is not None or cold_weight:
            raise ValueError("--cold, --cold-weight: expected --from with them")
        return None
    if model_file is not None:
        raise ValueError("--model: a run that continues another keeps its network")
    return Start(run, prior, cold, cold_weight, remember)


def summary(result: dict[str, Any]) -> str:
    """The result of a training as text."""
    from lirank.cli.evaluate import metrics_table

    lines = [f"note: {note}" for note in result["notes"]]
    lines.append(table(result["epochs"]))
    for part in ("valid", "test"):
        if result[part]:
            lines += [f"\n{part} ({result['rows'][part]} rows)", metrics_table(result[part])]
    if result.get("before"):
        lines += ["\nthe earlier run on the same test rows", metrics_table(result["before"])]
    return "\n".join(lines)
