"""Methods side by side over seeds: accuracy, flatness, cost, and paired differences."""

import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from core_tensor.app.files import read_json, reading, write_json

from msam.study.data import Task
from msam.study.names import METHODS
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
            values = [value for value in values if math.isfinite(value)]
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


_FIGURES = ("rho", "validation", "test", "train_loss", "step_ms", "lambda_max", "trace")


def as_row(run: Run) -> dict[str, Any]:
    """A run for JSON, without its history; None means a figure that is not finite.

    Args:
        run: The run.

    Returns:
        A dictionary.
    """
    row = {name: None if name in _FIGURES and not _finite(value) else value for name, value in asdict(run).items()}
    del row["history"]
    return row


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


@dataclass(frozen=True)
class Job:
    """One run that is asked for.

    Attributes:
        method: One of `msam.study.names.METHODS`.
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
    """Finished runs of one task, kept in a JSON file: a killed job resumes where it stopped.

    Args:
        path: JSON file, created at the first run; None keeps the runs in memory.
        settings: What the runs depend on beside their jobs, where no run folder has made sure of it.

    Attributes:
        content: What the file holds: `runs` by `Job.key`, and whatever the caller adds, such as `rows`.

    Raises:
        ValueError: If the file holds something else, or runs of other settings.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.content: dict[str, Any] = {"runs": {}} if settings is None else {"settings": dict(settings), "runs": {}}
        self._runs: dict[str, Run] = {}
        if path is not None and pathlib.Path(path).exists():
            self.content = read_json(path)
            with reading(path, "finished runs of msam"):
                self._runs = {str(key): _checked(row) for key, row in self.content["runs"].items()}
                if settings is not None and self.content.get("settings") != dict(settings):
                    raise ValueError(f"runs of {dict(settings)} are asked for")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The summary that `finish` wrote; empty before."""
        return list(self.content.get("rows", []))

    def run(self, task: Task, job: Job, **options: Any) -> Run:
        """Look a run up, or do it and write it down.

        Args:
            task: The task.
            job: The run.
            options: Further arguments of `msam.study.training.train`.

        Returns:
            The run.
        """
        if job.key not in self._runs:
            done = train(
                task, job.method, rho=job.rho, num_micro_batches=job.num_micro_batches, seed=job.seed,
                sharpness=job.sharpness, **options,
            )  # fmt: skip
            gaps = tuple({"sharpness_gap": h["sharpness_gap"]} for h in done.history if job.sharpness)  # what is drawn
            self._runs[job.key] = replace(done, history=gaps)
            self.content["runs"][job.key] = as_row(done) | {"history": list(gaps)}
            self.save()
        return self._runs[job.key]

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the summary.

        Args:
            rows: What `summarise` or `sensitivity` returned.
        """
        self.content["rows"] = [dict(row) for row in rows]
        self.save()

    def save(self) -> None:
        """Write everything, atomically."""
        if self.path is not None:
            write_json(self.path, self.content)


def _checked(row: Mapping[str, Any]) -> Run:
    """A run as the ledger's file holds it; the caller turns every error into one that names the file."""
    history = tuple({"sharpness_gap": float(figures["sharpness_gap"])} for figures in row.get("history", ()))
    run = Run(**{**row, "history": history})
    if run.method not in METHODS or not all(isinstance(n, int) for n in (run.num_micro_batches, run.seed)):
        raise ValueError(f"method {run.method!r}, m = {run.num_micro_batches!r}, seed {run.seed!r}")
    figures = [getattr(run, name) for name in _FIGURES]
    if not all(value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in figures):
        raise ValueError(f"figures {figures}")
    unknown = {name: math.nan for name in ("validation", "train_loss") if getattr(run, name) is None}
    if any(getattr(run, name) is None for name in ("rho", "test", "step_ms")):
        raise ValueError("no rho, test or step_ms")
    return replace(run, **unknown)  # type: ignore[arg-type]  # both are floats
