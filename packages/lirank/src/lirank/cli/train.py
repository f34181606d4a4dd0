"""`lirank train`."""

from pathlib import Path
from typing import Any

import click
from core_tensor.app.cli import emit, json_option, out_option, overwrite_option, seed_option, table, threads_option

from lirank.cli.options import LOGS, logs_argument, schema_option, split_options


@click.command(epilog=LOGS)
@logs_argument
@schema_option
@out_option("Folder of the run.", folder=True, required=True)
@click.option("--model", "model_file", type=click.Path(exists=True, path_type=Path), help="Network (YAML).")
@click.option("--epochs", type=click.IntRange(1), default=4, help="Most passes over the training rows.")
@click.option("--batch-size", type=click.IntRange(2), default=1024, help="Rows of a step.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=1e-3, help="Learning rate of the network.")
@click.option("--row-lr", type=click.FloatRange(0, min_open=True), default=2e-3, help="Learning rate of the table.")
@click.option("--row-optimizer", type=click.Choice(["adam", "adagrad"]), default="adam", help="Of the table.")
@click.option("--checkpoint-every", type=click.IntRange(0), default=0, help="Steps; 0 is one checkpoint per epoch.")
@split_options
@seed_option
@threads_option
@overwrite_option
@json_option
def train(
    logs: Path,
    schema_file: Path,
    out: Path,
    model_file: Path | None,
    kind: str,
    valid: float,
    test: float,
    allow_future: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train on LOGS; the same command continues after a kill, to the same bytes."""
    from core_tensor.app.runs import RunFolder

    from lirank.data.parquet import ParquetLog
    from lirank.data.split import Split
    from lirank.model.config import ModelConfig, load_config
    from lirank.schema.features import load_schema
    from lirank.train.loop import TrainConfig
    from lirank.workflow import train_run

    log, schema = ParquetLog.open(logs), load_schema(schema_file)
    split = Split(kind, valid, test, allow_future)  # type: ignore[arg-type]
    model, training = load_config(model_file) if model_file else ModelConfig(), TrainConfig(**options)
    inputs = {
        "data": log.digest,
        "schema": schema.to_yaml(),
        "split": split,
        "model": model.to_dict(),
        "train": training.to_dict(),
    }
    with RunFolder.claim(out, "lirank train", inputs, overwrite=overwrite) as run:
        result = run.result
        if result is None:
            result = train_run(log, schema, split, model, training, run.path)
            run.finish(result)
    emit(result, as_json, lambda: summary(result))


def summary(result: dict[str, Any]) -> str:
    """The result of a training as text."""
    from lirank.cli.evaluate import metrics_table

    lines = [f"note: {note}" for note in result["notes"]]
    lines.append(table(result["epochs"]))
    for part in ("valid", "test"):
        if result[part]:
            lines += [f"\n{part} ({result['rows'][part]} rows)", metrics_table(result[part])]
    return "\n".join(lines)
