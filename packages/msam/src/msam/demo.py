"""The demo: SGD, SAM and mSAM on scikit-learn's real digits."""

from pathlib import Path
from typing import Any

from core_tensor.app import figures
from core_tensor.app.cli import progress

from msam.study import plots
from msam.study.compare import Job, Ledger, summarise
from msam.study.data import digits
from msam.study.portrait import draw_portrait, gaps_of

METHODS = ("sgd", "sam", "msam-sequential", "msam")


def run_demo(
    picture: Path, *, seeds: int, epochs: int, rho: float, micro_batches: int, portrait: Path | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train every method, compare accuracy, sharpness and time, and draw them.

    Args:
        picture: Picture to write.
        seeds: Runs of every method.
        epochs: Passes over the training digits.
        rho: Radius of the perturbation.
        micro_batches: Micro-batches m per mini-batch.
        portrait: Second picture, of cosines, sharpness gaps and landscapes, or None.

    Returns:
        The headline figures, and a row for each method.

    Raises:
        ValueError: If a picture's suffix names no format, or rho is out of range.
        MissingExtraError: If matplotlib or scikit-learn is missing.
    """
    for path in (picture, portrait):
        if path is not None:
            figures.check(path, "msam[demo]")
    task, ledger = digits(), Ledger(None)
    jobs = [Job(method, rho, micro_batches, seed) for seed in range(seeds) for method in METHODS]
    runs = [ledger.run(task, job, epochs=epochs) for job in progress(jobs, "training", unit="run")]
    rows = summarise(runs)
    plots.comparison(rows, gaps_of(runs), picture, f"digits, {seeds} seeds, rho = {rho:g}, m = {micro_batches}")
    if portrait is not None:
        draw_portrait(task, rho, micro_batches, portrait, epochs)
    by_name = {row["method"]: row for row in rows}
    figures_of_merit = {
        "picture": str(picture),
        "ghost_step_ratio": by_name["msam"]["step_ratio"],
        "sequential_step_ratio": by_name["msam-sequential"]["step_ratio"],
        "sam_step_ratio": by_name["sam"]["step_ratio"],
        "test_accuracy": {row["method"]: row["test"] for row in rows},
        "lambda_max": {row["method"]: row["lambda_max"] for row in rows},
    }
    return figures_of_merit, rows
