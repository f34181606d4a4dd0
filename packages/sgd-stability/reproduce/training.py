"""The monitor and the scheduler in training: warnings in time and not in vain, the rate without a grid, the price.

    python packages/sgd-stability/reproduce/training.py [--quick] [--only PART] [-o FOLDER]

The bars of `benchmarks/training_bars.py` and `benchmarks/large.py`, written to `training.json`: ramps of the rate under
SGD, momentum and Adam; five settings of the scheduler against a grid of fixed rates; what a check costs beside
training; and the largest eigenvalue of a transformer of 100 million parameters (not with `--quick`). Every run is
written as it ends, and those that are in the file already are not repeated (delete it to start anew).
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core_tensor.app.cli import progress
from core_tensor.app.files import read_json, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from _options import Options, options
from large import top_eig_100m
from training_bars import (
    OVERHEADS,
    RAMPS,
    SEEDS,
    SETTINGS,
    overhead,
    ramp_run,
    ramp_summary,
    scheduler_run,
    scheduler_summary,
)

Runs = list[dict[str, Any]]
Steps = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
"""The runs of a part, by name, and what computes each."""


def alarms(quick: bool) -> Steps:
    """Ramps, and runs at the best rate."""
    for name, seed in RAMPS[:2] if quick else RAMPS:
        yield f"{name}, seed {seed}", lambda name=name, seed=seed: ramp_run(name, seed)


def scheduler(quick: bool) -> Steps:
    """Over the best fixed rate of a grid, by setting and seed."""
    for name in SETTINGS:
        for seed in SEEDS[: 1 if quick else 3]:
            yield f"{name}, seed {seed}", lambda name=name, seed=seed: scheduler_run(name, seed, 3 if quick else 5)


def price(quick: bool) -> Steps:
    """Of a check every 200 steps, as a share of the training's CPU time."""

    def measured(name: str) -> dict[str, Any]:
        found = overhead(name, quick)
        detail, share = found[f"monitor_overhead_{name}_detail"], found[f"monitor_overhead_{name}"]
        return {"run": name, "share": share, "check_s": detail["ours_s"][1], "parameters": detail["parameters"]}

    for name in OVERHEADS:
        yield name, lambda name=name: measured(name)


def large(quick: bool) -> Steps:
    """Seconds, products and memory."""

    def measured() -> dict[str, Any]:
        found = top_eig_100m(False)
        detail = found.get("top_eig_100m_parameters_detail", {})
        return {"run": "transformer", "seconds": found["top_eig_100m_parameters"], **detail}

    if not quick:
        yield "transformer", measured


PARTS: dict[str, tuple[Callable[[bool], Steps], Callable[[Runs], dict[str, Any]]]] = {
    "alarms": (alarms, ramp_summary),
    "scheduler": (scheduler, scheduler_summary),
    "price": (price, lambda _: {}),
    "large": (large, lambda _: {}),
}


def part(name: str, chosen: Options) -> None:
    """One part; its runs of an earlier call stay."""
    path = chosen.out / "training.json"
    steps, summary = PARTS[name]
    for label, run in progress(list(steps(chosen.quick)), name, unit="run"):
        held = read_json(path) if path.exists() else {}
        runs = held.get(name, {}).get("runs", [])
        if any(known["run"] == label for known in runs):
            continue
        runs.append(run())
        write_json(path, {**held, name: {**summary(runs), "runs": runs}})


def main() -> None:
    """The parts asked for."""
    chosen = options(__doc__, tuple(PARTS))
    for name in chosen.only:
        part(name, chosen)


if __name__ == "__main__":
    main()
