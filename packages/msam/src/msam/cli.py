"""The command `msam`."""

from pathlib import Path
from typing import Any

import click
from core_tensor.cli import command_line, emit, json_option, progress, table
from core_tensor.files import write_json

from msam import plots
from msam.compare import as_row, run_all, summarise
from msam.data import TASKS, digits, load
from msam.training import METHODS, Run

COLUMNS = ("method", "rho", "m", "seeds", "test", "test_se", "lambda_max", "trace", "step_ms", "step_ratio")


@command_line("msam")
def main() -> None:
    """mSAM: micro-batch-averaged sharpness-aware minimization, exact and cheaper than SAM."""


def _gaps(runs: list[Run]) -> dict[str, list[float]]:
    firsts: dict[str, list[float]] = {}
    for run in runs:
        if run.history and run.method not in firsts:
            firsts[run.method] = [max(float(h["sharpness_gap"]), 1e-8) for h in run.history]
    return firsts


def _show(rows: list[dict[str, Any]], columns: tuple[str, ...] = COLUMNS) -> str:
    return table([{name: row.get(name) for name in columns} for row in rows])


@main.command()
@click.option("--seeds", default=2, type=click.IntRange(1), help="Runs of every method.")
@click.option("--epochs", default=30, type=click.IntRange(1), help="Passes over the training digits.")
@click.option("--rho", default=0.1, type=float, help="Radius of the perturbation.")
@click.option("--micro-batches", default=8, type=click.IntRange(1), help="Micro-batches m per mini-batch of 128.")
@click.option("--out", default="msam-demo.png", type=click.Path(path_type=Path), help="Picture to write.")
@json_option
def demo(seeds: int, epochs: int, rho: float, micro_batches: int, out: Path, as_json: bool) -> None:
    """SGD, SAM and mSAM (sequential and ghost) on scikit-learn's real digits: accuracy, sharpness, time, plot."""
    methods = ("sgd", "sam", "msam-sequential", "msam")
    tasks = [(digits(), method, rho, micro_batches, seed) for seed in range(seeds) for method in methods]
    runs = list(run_all(progress(tasks, "training", unit="run"), epochs=epochs))
    rows = summarise(runs)
    plots.comparison(rows, _gaps(runs), out, f"digits, {seeds} seeds, rho = {rho:g}, m = {micro_batches}")
    by_name = {row["method"]: row for row in rows}
    result = {
        "picture": str(out),
        "ghost_step_ratio": by_name["msam"]["step_ratio"],
        "sequential_step_ratio": by_name["msam-sequential"]["step_ratio"],
        "sam_step_ratio": by_name["sam"]["step_ratio"],
        "test_accuracy": {row["method"]: row["test"] for row in rows},
        "lambda_max": {row["method"]: row["lambda_max"] for row in rows},
    }
    emit(result, as_json, lambda: f"{_show(rows)}\n\npicture: {out}")


@main.command()
@click.option("--data", default="digits", type=click.Choice(TASKS), help="What to train on.")
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), help="Data files of mnist, cifar, polarity."
)
@click.option("--methods", default="sgd,sam,asam,msam", help="Comma-separated, out of: " + ", ".join(METHODS) + ".")
@click.option("--seeds", default=5, type=click.IntRange(1), help="Runs of every method.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training part; the task's own if absent.")
@click.option("--rho", default=0.1, type=float, help="Radius of the perturbation (ASAM: ten times that).")
@click.option("--micro-batches", default=8, type=click.IntRange(1), help="Micro-batches m per mini-batch.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file with every run.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture to write.")
@json_option
def compare(
    data: str,
    folder: Path | None,
    methods: str,
    seeds: int,
    epochs: int | None,
    rho: float,
    micro_batches: int,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Accuracy, flatness and cost per method over seeds, with paired differences to SGD and their standard errors."""
    names = _names(methods)
    task = load(data, folder)
    radius = {"asam": 10 * rho}
    tasks = [(task, name, radius.get(name, rho), micro_batches, seed) for seed in range(seeds) for name in names]
    runs = list(run_all(progress(tasks, f"training on {data}", unit="run"), epochs=epochs))
    rows = summarise(runs)
    result = {"data": data, "rows": rows, "runs": [as_row(run) for run in runs]}
    if out is not None:
        write_json(out, result)
    if plot is not None:
        plots.comparison(rows, _gaps(runs), plot, f"{data}, {seeds} seeds, rho = {rho:g}, m = {micro_batches}")
    emit(result, as_json, lambda: _show(rows, (*COLUMNS, "difference", "difference_se")))


def _names(methods: str) -> list[str]:
    names = [name.strip() for name in methods.split(",")]
    unknown = [name for name in names if name not in METHODS]
    if unknown or len(set(names)) != len(names):
        raise ValueError(f"methods: expected different ones out of {', '.join(METHODS)}, got {methods!r}")
    return names
