"""`lirank baseline`."""

from pathlib import Path

import click
from core_tensor.app.cli import emit, json_option, seed_option

from lirank.cli.evaluate import metrics_table
from lirank.cli.options import LOGS, logs_argument, schema_option, split_options


@click.command(epilog=LOGS)
@logs_argument
@schema_option()
@split_options
@seed_option
@json_option
def baseline(
    logs: Path,
    schema_file: Path,
    kind: str,
    valid: float,
    test: float,
    allow_future: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Logistic regression and LightGBM on LOGS: the same rows, ids and causal features that a model would get."""
    from lirank.data.parquet import ParquetLog
    from lirank.data.split import Split
    from lirank.schema.features import load_schema
    from lirank.workflow import baselines

    split = Split(kind, valid, test, allow_future)  # type: ignore[arg-type]
    found = baselines(ParquetLog.open(logs), load_schema(schema_file), split, seed)
    emit(found, as_json, lambda: "\n".join(f"{label}\n{metrics_table(entry)}\n" for label, entry in found.items()))
