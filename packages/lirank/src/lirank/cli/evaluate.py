"""`lirank evaluate`."""

from pathlib import Path
from typing import Any

import click
from core_tensor.app.cli import emit, json_option, table, threads_option

from lirank.cli.options import run_argument

_SHOWN = ("rows", "positives", "auc", "gauc", "logloss", "normalized_entropy", "calibration_error", "calibration_ratio")


@click.command()
@run_argument
@click.argument("logs", type=click.Path(exists=True, path_type=Path), required=False)
@click.option("--intervals", is_flag=True, help="Bootstrap intervals of the AUC, over groups.")
@click.option(
    "--by",
    default="",
    show_default=False,
    help="Column of LOGS whose values are reported one by one (the 20 most frequent).",
)
@click.option("--against", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Run to compare with.")
@threads_option
@json_option
def evaluate(run: Path, logs: Path | None, intervals: bool, by: str, against: Path | None, as_json: bool) -> None:
    """Metrics of RUN on its own test rows, or on LOGS from after its training.

    The causal features of LOGS continue from what RUN remembers, so LOGS must not hold rows from before its end.
    """
    from lirank.workflow import evaluate_run

    found = evaluate_run(run, logs, intervals=intervals, by=by, against=against)

    def text() -> str:
        parts = [metrics_table(found["labels"])]
        parts += [f"\n{by} = {name}\n{metrics_table(entry)}" for name, entry in found.get("segments", {}).items()]
        if "against" in found:
            parts += [f"\nagainst {against}, with 95 % intervals", table(found["against"])]
        return "\n".join(parts)

    emit(found, as_json, text)


def metrics_table(found: dict[str, dict[str, Any]]) -> str:
    """Metrics by label as a table, reasons below."""
    rows = []
    for label, entry in found.items():
        rows.append({"label": label} | {name: entry[name] for name in _SHOWN if name in entry})
        if "auc_low" in entry:
            rows[-1] |= {"auc_low": entry["auc_low"], "auc_high": entry["auc_high"]}
    reasons = [f"{label}: {entry['reason']}" for label, entry in found.items() if "reason" in entry]
    return "\n".join([table(rows), *reasons])
