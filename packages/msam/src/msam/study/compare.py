"""Methods side by side over seeds: accuracy, flatness, cost, and paired differences."""

import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core_tensor.app.files import read_json, write_json

from msam.study.data import Task
from msam.study.training import Run, train


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of a mean.

    Args:
        values: Independent measurements.

    Returns:
        The error, or None for a single value.
    """
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def summarise(runs: Iterable[Run], baseline: str = "sgd") -> list[dict[str, Any]]:
    """Means over seeds by method, with the paired difference in test accuracy to a baseline.

    Args:
        runs: Runs of all methods over the same seeds.
        baseline: Method whose runs the differences are taken from.

    Returns:
        One row per method, in order of appearance: means, `_se` standard errors, `step_ratio` to the baseline,
        `difference` (percentage points) and `difference_se`.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    reference = {run.seed: run for run in groups.get(baseline, [])}
    rows = []
    for method, members in groups.items():
        row: dict[str, Any] = {
            "method": method,
            "rho": members[0].rho,
            "m": members[0].num_micro_batches,
            "seeds": len(members),
        }
        for key in ("test", "validation", "train_loss", "lambda_max", "trace", "step_ms"):
            values = [getattr(run, key) for run in members if getattr(run, key) is not None]
            values = [value for value in values if not math.isnan(value)]
            row[key] = statistics.fmean(values) if values else None
            row[f"{key}_se"] = standard_error(values) if values else None
        row |= paired(members, reference)
        rows.append(row)
    return rows


def paired(members: Sequence[Run], reference: Mapping[int, Run]) -> dict[str, Any]:
    """Differences to another method's runs of the same seeds.

    Args:
        members: Runs of one method.
        reference: Runs of the other by seed.

    Returns:
        `difference`, `difference_se` (percentage points of test accuracy) and `step_ratio`; None without pairs.
    """
    pairs = [(run, reference[run.seed]) for run in members if run.seed in reference]
    if not pairs:
        return {"difference": None, "difference_se": None, "step_ratio": None}
    differences = [a.test - b.test for a, b in pairs]
    return {
        "difference": statistics.fmean(differences),
        "difference_se": standard_error(differences),
        "step_ratio": statistics.median(a.step_ms / b.step_ms for a, b in pairs),
    }


def sensitivity(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Means over seeds for every pair of m and rho.

    Args:
        runs: Runs of the mSAM family (SAM has m = 1).

    Returns:
        One row per pair, in order of appearance, as `summarise` makes them.
    """
    groups: dict[tuple[int, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.num_micro_batches, run.rho), []).append(run)
    return [summarise(members)[0] for members in groups.values()]


def as_row(run: Run) -> dict[str, Any]:
    """A run for JSON, without its history.

    Args:
        run: The run.

    Returns:
        A dictionary.
    """
    row = asdict(run)
    del row["history"]
    return row


@dataclass(frozen=True)
class Job:
    """One run that is asked for.

    Attributes:
        method: One of `msam.study.training.METHODS`.
        rho: Radius.
        num_micro_batches: Micro-batches m.
        seed: Of everything random.
        sharpness: Whether flatness is measured at the end; a run without it only serves tuning.
    """

    method: str
    rho: float
    num_micro_batches: int
    seed: int
    sharpness: bool = True

    @property
    def key(self) -> str:
        """Name of the run in a ledger."""
        tail = "" if self.sharpness else " tuning"
        return f"{self.method} rho={self.rho:g} m={self.num_micro_batches} seed={self.seed}{tail}"


class Ledger:
    """Finished runs of one task, kept in a JSON file: a killed job goes on where it stopped.

    Args:
        path: JSON file, created at the first run; None keeps the runs in memory.
        settings: What the runs depend on beside their jobs, such as the task and its epochs.

    Raises:
        ValueError: If the file holds runs of other settings.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": dict(settings), "runs": {}}
        if path is not None and pathlib.Path(path).exists():
            self.content = read_json(path)
            if not isinstance(self.content, dict) or self.content.get("settings") != dict(settings):
                raise ValueError(f"out: expected a file with runs of {dict(settings)}, got other ones in {path}")

    def run(self, task: Task, job: Job, **options: Any) -> Run:
        """Look a run up, or do it and write it down.

        Args:
            task: The task.
            job: The run.
            options: Further arguments of `msam.study.training.train`.

        Returns:
            The run.
        """
        if job.key not in self.content["runs"]:
            done = train(
                task, job.method, rho=job.rho, num_micro_batches=job.num_micro_batches, seed=job.seed,
                sharpness=job.sharpness, **options,
            )  # fmt: skip
            gaps = [{"sharpness_gap": h["sharpness_gap"]} for h in done.history if job.sharpness]  # what is drawn
            self.content["runs"][job.key] = asdict(done) | {"history": gaps}
            self.save()
        return Run(**self.content["runs"][job.key])

    def save(self) -> None:
        """Write everything, atomically."""
        if self.path is not None:
            write_json(self.path, self.content)
