"""The command `msam`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from core_tensor.app.cli import command_line, emit, json_option, progress, table
from core_tensor.checks import check_choice

from msam.study import plots
from msam.study.compare import Job, Ledger, as_row, sensitivity, summarise
from msam.study.cost import MODELS, MODES, ratios
from msam.study.data import TASKS, Task, digits, load, noisy
from msam.study.flatness import loss_slice
from msam.study.training import METHODS, Run, mean_loss, train


def _picture(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    del context
    if path is not None:
        plots.check_picture(str(parameter.name), path)
    return path


COLUMNS = ("method", "rho", "m", "seeds", "test", "test_se", "lambda_max", "trace", "step_ms", "step_ratio")

data_option = click.option("--data", default="digits", type=click.Choice(TASKS), help="What to train on.")
folder_option = click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), help="Data files of mnist, cifar, polarity."
)
noise_option = click.option("--label-noise", default=0.0, type=float, help="Share of training labels made wrong.")
epochs_option = click.option("--epochs", type=click.IntRange(1), help="Passes over the training part; else the task's.")
out_option = click.option(
    "--out", type=click.Path(path_type=Path), help="JSON file with every run; a killed command goes on from it."
)
plot_option = click.option("--plot", type=click.Path(path_type=Path), callback=_picture, help="Picture to write.")


@command_line("msam")
def main() -> None:
    """mSAM: micro-batch-averaged sharpness-aware minimization, exact and cheaper than SAM."""


@main.command()
@click.option("--seeds", default=2, type=click.IntRange(1), help="Runs of every method.")
@click.option("--epochs", default=30, type=click.IntRange(1), help="Passes over the training digits.")
@click.option("--rho", default=0.1, type=float, help="Radius of the perturbation.")
@click.option("--micro-batches", default=8, type=click.IntRange(1), help="Micro-batches m per mini-batch of 128.")
@click.option(
    "--out", default="msam-demo.png", type=click.Path(path_type=Path), callback=_picture, help="Picture to write."
)
@click.option(
    "--portrait", type=click.Path(path_type=Path), callback=_picture,
    help="Second picture: cosines, sharpness gap, landscape.",
)  # fmt: skip
@json_option
def demo(
    seeds: int, epochs: int, rho: float, micro_batches: int, out: Path, portrait: Path | None, as_json: bool
) -> None:
    """SGD, SAM and mSAM (sequential and ghost) on scikit-learn's real digits: accuracy, sharpness, time, plot."""
    task, methods = digits(), ("sgd", "sam", "msam-sequential", "msam")
    jobs = [Job(method, rho, micro_batches, seed) for seed in range(seeds) for method in methods]
    ledger = Ledger(None, {})
    runs = [ledger.run(task, job, epochs=epochs) for job in progress(jobs, "training", unit="run")]
    rows = summarise(runs)
    plots.comparison(rows, _gaps(runs), out, f"digits, {seeds} seeds, rho = {rho:g}, m = {micro_batches}")
    if portrait is not None:
        draw_portrait(task, rho, micro_batches, portrait, epochs)
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
@data_option
@folder_option
@noise_option
@click.option("--methods", default="sgd,sam,asam,msam", help="Comma-separated, out of: " + ", ".join(METHODS) + ".")
@click.option("--seeds", default=5, type=click.IntRange(1), help="Runs of every method.")
@epochs_option
@click.option("--rho", default=0.1, type=float, help="Radius of the perturbation (ASAM: ten times that).")
@click.option("--micro-batches", default=8, type=click.IntRange(1), help="Micro-batches m per mini-batch.")
@out_option
@plot_option
@json_option
def compare(
    data: str,
    folder: Path | None,
    label_noise: float,
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
    task = noisy(load(data, folder), label_noise)
    radius = {"asam": 10 * rho}
    jobs = [Job(name, radius.get(name, rho), micro_batches, seed) for seed in range(seeds) for name in names]
    ledger, runs = _run(task, jobs, out, epochs, label_noise)
    rows = summarise(runs)
    ledger.content["rows"] = rows
    ledger.save()
    if plot is not None:
        plots.comparison(rows, _gaps(runs), plot, f"{task.name}, {seeds} seeds, rho = {rho:g}, m = {micro_batches}")
    result = {"data": task.name, "rows": rows, "runs": [as_row(run) for run in runs]}
    emit(result, as_json, lambda: _show(rows, (*COLUMNS, "difference", "difference_se")))


@main.command()
@data_option
@folder_option
@noise_option
@click.option("--rho", "radii", default="0.05,0.1,0.2,0.4", help="Radii, comma-separated.")
@click.option("--micro-batches", "counts", default="1,4,8,16", help="Numbers of micro-batches; 1 is SAM.")
@click.option("--seeds", default=2, type=click.IntRange(1), help="Runs of every pair.")
@epochs_option
@out_option
@plot_option
@json_option
def sweep(
    data: str,
    folder: Path | None,
    label_noise: float,
    radii: str,
    counts: str,
    seeds: int,
    epochs: int | None,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Sensitivity to rho and m: validation and test accuracy, flatness and time over a grid; the best by validation."""
    task = noisy(load(data, folder), label_noise)
    grid = [(int(m), rho) for m in _numbers("micro-batches", counts, whole=True) for rho in _numbers("rho", radii)]
    jobs = [Job("sam" if m == 1 else "msam", rho, m, seed) for m, rho in grid for seed in range(seeds)]
    ledger, runs = _run(task, jobs, out, epochs, label_noise)
    rows = sensitivity(runs)
    best = max(rows, key=lambda row: row["validation"])
    ledger.content["rows"] = rows
    ledger.save()
    if plot is not None:
        plots.sensitivity(rows, plot, task.name)
    columns = ("m", "rho", "validation", "test", "test_se", "lambda_max", "trace", "step_ms")
    result = {"data": task.name, "rows": rows, "best": {"m": best["m"], "rho": best["rho"], "test": best["test"]}}
    tail = f"best validation accuracy: m = {best['m']}, rho = {best['rho']:g}"
    emit(result, as_json, lambda: f"{_show(rows, columns)}\n\n{tail}")


@main.command()
@click.option("--models", default=",".join(MODELS), help="Comma-separated, out of: " + ", ".join(MODELS) + ".")
@click.option("--micro-batches", "counts", default="2,4,8,16", help="Numbers of micro-batches.")
@click.option("--modes", default="ghost,sequential", help="Comma-separated, out of: " + ", ".join(MODES) + ".")
@click.option("--repeats", default=5, type=click.IntRange(1), help="Rounds; every engine takes a turn in each.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch; its own choice if absent.")
@plot_option
@json_option
def cost(
    models: str, counts: str, modes: str, repeats: int, threads: int | None, plot: Path | None, as_json: bool
) -> None:
    """CPU time of an mSAM step over a plain one, by engine and number of micro-batches, on this machine."""
    if threads is not None:
        torch.set_num_threads(threads)
    names, engines = [n.strip() for n in models.split(",")], [n.strip() for n in modes.split(",")]
    for name in names:
        check_choice("models", name, MODELS)
    for engine in engines:
        check_choice("modes", engine, MODES)
    numbers = [int(m) for m in _numbers("micro-batches", counts, whole=True)]
    rows = [row for name in progress(names, "timing", unit="model") for row in ratios(name, numbers, engines, repeats)]
    if plot is not None:
        plots.cost(rows, plot, "cost of a step against the number of micro-batches")
    emit({"rows": rows}, as_json, lambda: table(rows))


def draw_portrait(task: Task, rho: float, micro_batches: int, path: Path, epochs: int | None = None) -> None:
    """Train SGD, SAM and mSAM once and draw cosines, sharpness gaps and the loss around each minimum.

    Args:
        task: The task.
        rho: Radius.
        micro_batches: Micro-batches m.
        path: Picture to write.
        epochs: Instead of the task's.
    """
    cosines: dict[str, list[float]] = {}
    gaps: dict[str, list[float]] = {}
    slices: dict[str, tuple[Any, Any]] = {}
    for method in ("sgd", "sam", "msam"):
        kept: dict[str, Any] = {}
        run = train(
            task, method, rho=rho, num_micro_batches=micro_batches, epochs=epochs, sharpness=False, explain=True,
            keep=kept,
        )  # fmt: skip
        slices[method] = loss_slice(kept[method], mean_loss, task.train, radius=1.0, points=21)
        if method == "msam":
            cosines[method] = [c for figures in run.history for c in figures["cosines"]]
        gaps |= _gaps([run])
    plots.portrait(cosines, gaps, slices, path, f"{task.name}: rho = {rho:g}, m = {micro_batches}")


def _run(
    task: Task, jobs: Sequence[Job], out: Path | None, epochs: int | None, label_noise: float
) -> tuple[Ledger, list[Run]]:
    ledger = Ledger(out, {"data": task.name, "epochs": epochs or task.epochs, "label_noise": label_noise})
    return ledger, [
        ledger.run(task, job, epochs=epochs) for job in progress(jobs, f"training on {task.name}", unit="run")
    ]


def _gaps(runs: Sequence[Run]) -> dict[str, list[float]]:
    firsts: dict[str, list[float]] = {}
    for run in runs:
        if run.history and run.method not in firsts:
            firsts[run.method] = [max(float(h["sharpness_gap"]), 1e-8) for h in run.history]
    return firsts


def _show(rows: Sequence[dict[str, Any]], columns: tuple[str, ...] = COLUMNS) -> str:
    return table([{name: row.get(name) for name in columns} for row in rows])


def _names(methods: str) -> list[str]:
    names = [name.strip() for name in methods.split(",")]
    unknown = [name for name in names if name not in METHODS]
    if unknown or len(set(names)) != len(names):
        raise ValueError(f"methods: expected different ones out of {', '.join(METHODS)}, got {methods!r}")
    return names


def _numbers(name: str, text: str, whole: bool = False) -> list[float]:
    try:
        values: list[float] = [int(part) if whole else float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name}: expected comma-separated numbers, got {text!r}") from error
    if len(set(values)) != len(values) or not all(value >= whole for value in values):
        raise ValueError(f"{name}: expected different numbers >= {int(whole)}, got {text!r}")
    return values
