"""`lirank calibrate`."""

from pathlib import Path
from typing import Any

import click
from core_tensor.app.cli import emit, json_option, out_option, overwrite_option, table, threads_option

from lirank.cli.options import run_argument


@click.command()
@run_argument
@click.argument("logs", type=click.Path(exists=True, path_type=Path), required=False)
@out_option("Folder for the recalibrated run.", folder=True, required=True)
@click.option(
    "--method",
    type=click.Choice(["auto", "shift", "platt", "isotonic"]),
    default="auto",
    help="A shift below 50 positives, a line below 500, else an isotonic curve (PAVA).",
)
@threads_option
@overwrite_option
@json_option
def calibrate(run: Path, logs: Path | None, out: Path, method: Any, overwrite: bool, as_json: bool) -> None:
    """Refresh the calibration of RUN from the labels of LOGS, or of its own validation rows, without retraining.

    LOGS must lie after the training of RUN; the new run remembers their events too.
    """
    from core_tensor.app.files import digest
    from core_tensor.app.runs import RunFolder

    from lirank.data.parquet import ParquetLog
    from lirank.train.run import MODEL
    from lirank.workflow import calibrate_run

    inputs = {"run": digest(run / MODEL), "data": ParquetLog.open(logs).digest if logs else "", "method": method}
    with RunFolder.claim(out, "lirank calibrate", inputs, overwrite=overwrite) as claimed:
        if claimed.result is None:
            claimed.finish(calibrate_run(run, logs, claimed.path, method))
        found = claimed.result or {}
    rows = [
        {"label": label, "method": entry["method"], "": when}
        | {name: entry[when][name] for name in ("rows", "logloss", "calibration_error", "calibration_ratio", "auc")}
        for label, entry in found.items()
        for when in ("before", "after")
    ]
    emit(found, as_json, lambda: table(rows))
