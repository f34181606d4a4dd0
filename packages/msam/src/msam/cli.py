"""The command `msam`."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from core_tensor.app import figures
from core_tensor.app.cli import (
    command_line,
    emit,
    json_option,
    out_option,
    overwrite_option,
    progress,
    quick_option,
    table,
    threads_option,
)

from msam.study.names import METHODS, MODELS, MODES, TASKS

if TYPE_CHECKING:
    from msam.study.compare import Job, Ledger
    from msam.study.data import Task
    from msam.study.training import Run


def _picture(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a picture that could not be written, before any work."""
    del context, parameter
    if path is not None:
        figures.check(path, "msam[plot]")
    return path


COLUMNS = ("method", "rho", "m", "seeds", "test", "test_se", "lambda_max", "trace", "step_ms", "step_ratio")

data_option = click.option("--data", default="digits", type=click.Choice(TASKS), help="What to train on.")
folder_option = click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), help="Data files of mnist, cifar, polarity."
)
noise_option = click.option("--label-noise", default=0.0, type=float, help="Share of training labels made wrong.")
epochs_option = click.option("--epochs", type=click.IntRange(1), help="Passes over the training part; else the task's.")
runs_option = out_option("Folder for every run; the same command continues from it, also with more seeds.", folder=True)
plot_option = click.option("--plot", type=click.Path(path_type=Path), callback=_picture, help="Picture to write.")


@command_line("msam")
def main() -> None:
    """mSAM: micro-batch-averaged sharpness-aware minimization, exact and cheaper than SAM."""


@main.command()
@click.option("--seeds", default=2, type=click.IntRange(1), help="Runs of every method.")
@click.option("--epochs", default=30, type=click.IntRange(1), help="Passes over the training digits.")
@click.option("--rho", default=0.1, type=float, help="Radius of the perturbation.")
@click.option("--micro-batches", default=8, type=click.IntRange(1), help="Micro-batches m per mini-batch of 128.")
@out_option("Picture to write.", default="msam-demo.png")
@click.option(
    "--portrait", type=click.Path(path_type=Path), callback=_picture,
    help="Second picture: cosines, sharpness gap, landscape.",
)  # fmt: skip
@quick_option
@json_option
def demo(
    seeds: int,
    epochs: int,
    rho: float,
    micro_batches: int,
    out: Path,
    portrait: Path | None,
    quick: bool,
    as_json: bool,
) -> None:
    """SGD, SAM and mSAM (sequential and ghost) on scikit-learn's real digits: accuracy, sharpness, time, plot."""
    figures.check(out, "msam[demo]")
    from msam.demo import run_demo

    if quick:
        seeds, epochs = 1, min(epochs, 6)
    result, rows = run_demo(
        out, seeds=seeds, epochs=epochs, rho=rho, micro_batches=micro_batches, portrait=portrait
    )  # fmt: skip
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
@runs_option
@overwrite_option
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
    overwrite: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Accuracy, flatness and cost per method over seeds, with paired differences to SGD and their standard errors."""
    names = _names("methods", methods, METHODS)
    from msam.study import plots
    from msam.study.compare import Job, as_row, summarise
    from msam.study.data import load, noisy
    from msam.study.portrait import gaps_of

    task = noisy(load(data, folder), label_noise)
    jobs = [
        Job(name, 10 * rho if name == "asam" else rho, micro_batches, seed) for seed in range(seeds) for name in names
    ]
    with _ledger("compare", task, out, epochs, label_noise, overwrite) as ledger:
        runs = _train(ledger, task, jobs, epochs)
        rows = summarise(runs)
        ledger.finish(rows)
    if plot is not None:
        title = f"{task.name}, {seeds} seeds, rho = {rho:g}, m = {micro_batches}"
        plots.comparison(rows, gaps_of(runs), plot, title)
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
@runs_option
@overwrite_option
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
    overwrite: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Sensitivity to rho and m: validation and test accuracy, flatness and time over a grid; the best by validation."""
    grid = [(int(m), rho) for m in _numbers("micro-batches", counts, whole=True) for rho in _numbers("rho", radii)]
    from msam.study import plots
    from msam.study.compare import Job, sensitivity
    from msam.study.data import load, noisy

    task = noisy(load(data, folder), label_noise)
    jobs = [Job("sam" if m == 1 else "msam", rho, m, seed) for m, rho in grid for seed in range(seeds)]
    with _ledger("sweep", task, out, epochs, label_noise, overwrite) as ledger:
        rows = sensitivity(_train(ledger, task, jobs, epochs))
        ledger.finish(rows)
    best = max(rows, key=lambda row: row["validation"] if row["validation"] is not None else -1.0)
    if plot is not None:
        plots.sensitivity(rows, plot, task.name)
    columns = ("m", "rho", "validation", "test", "test_se", "lambda_max", "trace", "step_ms")
    result = {"data": task.name, "rows": rows, "best": {"m": best["m"], "rho": best["rho"], "test": best["test"]}}
    tail = f"best validation accuracy: m = {best['m']}, rho = {best['rho']:g}"
    emit(result, as_json, lambda: f"{_show(rows, columns)}\n\n{tail}")


@main.command()
@click.option("--models", default=",".join(MODELS), help="Comma-separated, out of: " + ", ".join(MODELS) + ".")
@click.option("--micro-batches", "counts", default="2,4,8,16", help="Numbers of micro-batches.")
@click.option("--modes", default="ghost,chained,sequential", help="Comma-separated, out of: " + ", ".join(MODES) + ".")
@click.option("--repeats", default=5, type=click.IntRange(1), help="Rounds; every engine takes a turn in each.")
@threads_option
@plot_option
@json_option
def cost(models: str, counts: str, modes: str, repeats: int, plot: Path | None, as_json: bool) -> None:
    """CPU time of an mSAM step over a plain one, by engine and number of micro-batches, on this machine."""
    names, engines = _names("models", models, MODELS), _names("modes", modes, MODES)
    numbers = [int(m) for m in _numbers("micro-batches", counts, whole=True)]
    from msam.study import plots
    from msam.study.cost import ratios

    rows = [row for name in progress(names, "timing", unit="model") for row in ratios(name, numbers, engines, repeats)]
    if plot is not None:
        plots.cost(rows, plot, "cost of a step against the number of micro-batches")
    emit({"rows": rows}, as_json, lambda: table(rows))


@contextlib.contextmanager
def _ledger(
    command: str, task: "Task", out: Path | None, epochs: int | None, label_noise: float, overwrite: bool
) -> "Iterator[Ledger]":
    """The finished runs in a claimed folder, or in memory. More seeds, methods or radii join what is there."""
    from core_tensor.app.files import digest
    from core_tensor.app.runs import RunFolder

    from msam.study.compare import Ledger

    if out is None:
        yield Ledger(None)
        return
    inputs = {
        "data": task.name,
        "digest": digest(*task.train, *task.validation, *task.test),
        "epochs": epochs or task.epochs,
        "label_noise": label_noise,
    }
    with RunFolder.claim(out, f"msam {command}", inputs, overwrite=overwrite) as folder:
        ledger = Ledger(folder.path / "runs.json")
        yield ledger
        folder.finish({"rows": ledger.rows})


def _train(ledger: "Ledger", task: "Task", jobs: "Sequence[Job]", epochs: int | None) -> "list[Run]":
    return [ledger.run(task, job, epochs=epochs) for job in progress(jobs, f"training on {task.name}", unit="run")]


def _show(rows: Sequence[dict[str, Any]], columns: tuple[str, ...] = COLUMNS) -> str:
    return table([{name: row.get(name) for name in columns} for row in rows])


def _names(option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(known) or len(set(names)) != len(names):
        raise ValueError(f"{option}: expected different ones out of {', '.join(known)}, got {text!r}")
    return names


def _numbers(name: str, text: str, whole: bool = False) -> list[float]:
    try:
        values: list[float] = [int(part) if whole else float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name}: expected comma-separated numbers, got {text!r}") from error
    if len(set(values)) != len(values) or not all(whole <= value < float("inf") for value in values):
        raise ValueError(f"{name}: expected different finite numbers >= {int(whole)}, got {text!r}")
    return values
