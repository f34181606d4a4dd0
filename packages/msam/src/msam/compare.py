"""Methods side by side over seeds: accuracy, flatness, cost, and paired differences."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from msam.data import Task
from msam.training import Run, train


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


def run_all(
    tasks: Iterable[tuple[Task, str, float, int, int]], *, epochs: int | None = None, sharpness: bool = True
) -> Iterable[Run]:
    """Train everything that is asked for, one run at a time.

    Args:
        tasks: (task, method, rho, micro-batches, seed).
        epochs: Instead of the tasks' own.
        sharpness: Whether flatness is measured.

    Yields:
        The runs.
    """
    for task, method, rho, micro_batches, seed in tasks:
        yield train(
            task, method, rho=rho, num_micro_batches=micro_batches, seed=seed, epochs=epochs, sharpness=sharpness
        )


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
