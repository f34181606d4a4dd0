"""The papers' claims at a small scale: tune rho on validation for each method, then compare on fresh seeds.

    python packages/msam/reproduce/evidence.py --data digits [--folder DATA] [--seeds 5]
    python packages/msam/reproduce/evidence.py --data mnist1d --sensitivity

Writes one JSON file and one picture per data set to `results/`. Every finished run is written at once, and a run that
is there already is not repeated, so a killed evidence run goes on where it stopped. Seeds for choosing rho (100, 101)
are not among those that are reported (0, 1, ...).
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from core_tensor.files import read_json, write_json
from msam import plots
from msam.compare import paired, summarise
from msam.data import TASKS, Task, load
from msam.training import Run, train

RESULTS = Path(__file__).parent / "results"
GRIDS = {
    "sgd": (0.0,),
    "sam": (0.025, 0.05, 0.1, 0.2, 0.4),
    "asam": (0.25, 0.5, 1.0, 2.0, 4.0),
    "msam": (0.025, 0.05, 0.1, 0.2, 0.4),
}
TUNING_SEEDS = (100, 101)


class Ledger:
    """Finished runs of one data set, kept in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = read_json(path) if path.exists() else {"runs": {}}

    def run(self, task: Task, method: str, rho: float, micro_batches: int, seed: int, sharpness: bool) -> Run:
        """Look a run up, or do it and write it down."""
        key = f"{method} rho={rho:g} m={micro_batches} seed={seed}" + ("" if sharpness else " tuning")
        if key not in self.content["runs"]:
            done = train(task, method, rho=rho, num_micro_batches=micro_batches, seed=seed, sharpness=sharpness)
            row = {name: getattr(done, name) for name in Run.__dataclass_fields__ if name != "history"}
            self.content["runs"][key] = row
            self.save()
        return Run(**self.content["runs"][key])

    def save(self) -> None:
        """Write everything, atomically."""
        write_json(self.path, self.content)


def compare(ledger: Ledger, task: Task, seeds: int, micro_batches: int) -> None:
    """Each method at its own best rho, over fresh seeds."""
    chosen, runs = {}, []
    for method, grid in GRIDS.items():
        means = {
            rho: statistics.fmean(
                ledger.run(task, method, rho, micro_batches, seed, sharpness=False).validation for seed in TUNING_SEEDS
            )
            for rho in grid
        }
        chosen[method] = max(means, key=lambda rho: means[rho])
        ledger.content.setdefault("validation", {})[method] = {f"{rho:g}": value for rho, value in means.items()}
    for method, rho in chosen.items():
        runs += [ledger.run(task, method, rho, micro_batches, seed, sharpness=True) for seed in range(seeds)]
    rows = summarise(runs)
    by_seed = {run.seed: run for run in runs if run.method == "sam"}
    for row in rows:
        against = paired([run for run in runs if run.method == row["method"]], by_seed)
        row["difference_to_sam"], row["difference_to_sam_se"] = against["difference"], against["difference_se"]
    ledger.content |= {"data": task.name, "chosen_rho": chosen, "table": rows}
    ledger.save()
    title = f"{task.name}: every method at the rho of best validation accuracy, {seeds} seeds, m = {micro_batches}"
    plots.comparison(rows, {}, ledger.path.with_suffix(".png"), title)


def sensitivity(ledger: Ledger, task: Task, seeds: int) -> None:
    """Test accuracy and lambda_max over m and rho."""
    kept = ("rho", "test", "test_se", "lambda_max", "lambda_max_se", "trace")
    rows = []
    for micro_batches in (1, 4, 8, 16):
        method = "sam" if micro_batches == 1 else "msam"
        for rho in GRIDS["sam"][1:]:
            runs = [ledger.run(task, method, rho, micro_batches, seed, sharpness=True) for seed in range(seeds)]
            (row,) = summarise(runs)
            rows.append({"m": micro_batches} | {key: row[key] for key in kept})
    ledger.content["sensitivity"] = rows
    ledger.save()
    plots.sensitivity(rows, ledger.path.with_name(f"{ledger.path.stem}_sensitivity.png"), task.name)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=TASKS, default="digits")
    parser.add_argument("--folder", type=Path, help="data files of mnist, cifar, polarity")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--sensitivity", action="store_true", help="the grid over m and rho instead of the comparison")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ledger, task = Ledger(RESULTS / f"{options.data}.json"), load(options.data, options.folder)
    if options.sensitivity:
        sensitivity(ledger, task, options.seeds)
    else:
        compare(ledger, task, options.seeds, options.micro_batches)


if __name__ == "__main__":
    main()
