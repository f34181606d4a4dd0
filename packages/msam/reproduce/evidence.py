"""The papers' claims at a small scale: tune rho on validation for each method, then compare on fresh seeds.

    python packages/msam/reproduce/evidence.py --data digits [--folder DATA] [--seeds 5]
    python packages/msam/reproduce/evidence.py --data mnist1d --sensitivity
    python packages/msam/reproduce/evidence.py --data mnist1d --label-noise 0.3
    python packages/msam/reproduce/evidence.py --data digits --portrait

Writes one JSON file and one picture per data set to `results/`. Every finished run is written at once, and a run that
is there already is not repeated, so a killed evidence run goes on where it stopped. Seeds for choosing rho (100, 101)
are not among those that are reported (0, 1, ...).
"""

import argparse
import statistics
from pathlib import Path

import torch
from msam.study import plots
from msam.study.compare import Job, Ledger, paired, summarise
from msam.study.compare import sensitivity as by_m_and_rho
from msam.study.data import Task, load, noisy
from msam.study.names import TASKS
from msam.study.portrait import draw_portrait

RESULTS = Path(__file__).parent / "results"
RADII = (0.025, 0.05, 0.1, 0.2, 0.4)
TUNING_SEEDS = (100, 101)
EXAMPLES = {"cifar": 1000, "polarity": 1000}
"""Examples of the Hessian where all of them would take longer than the training."""


def compare(ledger: Ledger, task: Task, radii: tuple[float, ...], seeds: int, tuning_seeds: int, m: int) -> None:
    """Each method at its own best rho, over fresh seeds."""
    chosen, runs = {}, []
    grids = {"sgd": (0.0,), "sam": radii, "asam": tuple(10 * rho for rho in radii), "msam": radii}
    for method, grid in grids.items():
        means = {
            rho: statistics.fmean(
                ledger.run(task, Job(method, rho, m, seed, sharpness=False)).validation
                for seed in TUNING_SEEDS[:tuning_seeds]
            )
            for rho in grid
        }
        chosen[method] = max(means, key=lambda rho: means[rho])
        ledger.content.setdefault("validation", {})[method] = {f"{rho:g}": value for rho, value in means.items()}
    for method, rho in chosen.items():
        jobs = [Job(method, rho, m, seed) for seed in range(seeds)]
        runs += [ledger.run(task, job, examples=EXAMPLES.get(task.name, 4000)) for job in jobs]
    rows = summarise(runs)
    sam = {run.seed: run for run in runs if run.method == "sam"}
    for row in rows:
        against = paired([run for run in runs if run.method == row["method"]], sam)
        row["difference_to_sam"], row["difference_to_sam_se"] = against["difference"], against["difference_se"]
    ledger.content |= {"data": task.name, "chosen_rho": chosen, "table": rows}
    ledger.save()
    title = f"{task.name}: every method at the rho of best validation accuracy, {seeds} seeds, m = {m}"
    plots.comparison(rows, {}, Path(str(ledger.path)).with_suffix(".png"), title)


def sensitivity(ledger: Ledger, task: Task, seeds: int) -> None:
    """Test accuracy, top eigenvalue and trace over m and rho."""
    jobs = [
        Job("sam" if m == 1 else "msam", rho, m, seed)
        for m in (1, 4, 8, 16)
        for rho in RADII[1:]
        for seed in range(seeds)
    ]
    rows = by_m_and_rho(ledger.run(task, job) for job in jobs)
    ledger.content["sensitivity"] = rows
    ledger.save()
    path = Path(str(ledger.path))
    plots.sensitivity(rows, path.with_name(f"{path.stem}_sensitivity.png"), task.name)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=TASKS, default="digits")
    parser.add_argument("--folder", type=Path, help="data files of mnist, cifar, polarity")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tuning-seeds", type=int, default=2, choices=(1, 2))
    parser.add_argument("--radii", default=",".join(map(str, RADII)), help="the grid of rho; ASAM's is ten times that")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--label-noise", type=float, default=0.0, help="share of wrong training labels")
    parser.add_argument("--sensitivity", action="store_true", help="the grid over m and rho instead of the comparison")
    parser.add_argument("--portrait", action="store_true", help="only draw cosines, sharpness gap and landscape")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = noisy(load(options.data, options.folder), options.label_noise)
    if options.portrait:
        draw_portrait(task, 0.1, options.micro_batches, RESULTS / f"{task.name}_portrait.png")
        return
    ledger = Ledger(RESULTS / f"{task.name}.json", {"data": task.name, "label_noise": options.label_noise})
    if options.sensitivity:
        sensitivity(ledger, task, options.seeds)
    else:
        radii = tuple(float(rho) for rho in options.radii.split(","))
        compare(ledger, task, radii, options.seeds, options.tuning_seeds, options.micro_batches)


if __name__ == "__main__":
    main()
