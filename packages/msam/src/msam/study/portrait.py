"""What SGD, SAM and mSAM do to the loss around their minima, in one picture."""

import os
from collections.abc import Sequence
from typing import Any

from msam.study import plots
from msam.study.data import Task
from msam.study.flatness import loss_slice
from msam.study.training import Run, mean_loss, train


def draw_portrait(
    task: Task, rho: float, micro_batches: int, path: str | os.PathLike[str], epochs: int | None = None
) -> None:
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
        gaps |= gaps_of([run])
    plots.portrait(cosines, gaps, slices, path, f"{task.name}: rho = {rho:g}, m = {micro_batches}")


def gaps_of(runs: Sequence[Run]) -> dict[str, list[float]]:
    """The sharpness gap by epoch of each method's first run.

    Args:
        runs: Runs, with or without history.

    Returns:
        Gaps by method, where there are any; at least 1e-8, since they are drawn on a logarithmic axis.
    """
    firsts: dict[str, list[float]] = {}
    for run in runs:
        if run.history and run.method not in firsts:
            firsts[run.method] = [max(float(h["sharpness_gap"]), 1e-8) for h in run.history]
    return firsts
