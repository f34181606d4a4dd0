"""The papers' claims at a small scale: tune rho on validation for each method, then compare on fresh seeds.

    python packages/msam/reproduce/evidence.py --data digits [--folder DATA] [--seeds 5]
    python packages/msam/reproduce/evidence.py --data mnist1d --sensitivity
    python packages/msam/reproduce/evidence.py --data mnist1d --label-noise 0.3
    python packages/msam/reproduce/evidence.py --data digits --portrait
    python packages/msam/reproduce/evidence.py --quick -o /tmp/evidence    # a look at the whole thing in a minute

Writes one JSON file and one picture per data set to the folder of `-o` (`results/`). Every finished run is written at
once, and a run that is there already is not repeated, so a killed evidence run goes on where it stopped. Seeds for
choosing rho (100, 101) are not among those that are reported (0, 1, ...).
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


def compare(
    ledger: Ledger, task: Task, radii: tuple[float, ...], seeds: int, tuning_seeds: int, m: int, epochs: int | None
) -> None:
    """Each method at its own best rho, over fresh seeds."""
    chosen, runs = {}, []
    doubled = tuple(2 * rho for rho in radii)  # a direction that is a step old does about half as much
    grids = {"sgd": (0.0,), "sam": radii, "asam": tuple(10 * rho for rho in radii), "msam": radii, "chained": doubled}
    for method, grid in grids.items():
        means = {
            rho: statistics.fmean(
                ledger.run(task, Job(method, rho, m, seed, sharpness=False), epochs=epochs).validation
                for seed in TUNING_SEEDS[:tuning_seeds]
            )
            for rho in grid
        }
        chosen[method] = max(means, key=lambda rho: means[rho])
        ledger.content.setdefault("validation", {})[method] = {f"{rho:g}": value for rho, value in means.items()}
    for method, rho in chosen.items():
        jobs = [Job(method, rho, m, seed) for seed in range(seeds)]
        runs += [ledger.run(task, job, examples=EXAMPLES.get(task.name, 4000), epochs=epochs) for job in jobs]
    rows = summarise(runs)
    sam = {run.seed: run for run in runs if run.method == "sam"}
    for row in rows:
        against = paired([run for run in runs if run.method == row["method"]], sam)
        del row["step_ms"], row["step_ms_se"], row["step_ratio"]  # `cost.py` measures that, by itself on the machine
        row["difference_to_sam"], row["difference_to_sam_se"] = against["difference"], against["difference_se"]
    ledger.content |= {"data": task.name, "chosen_rho": chosen, "table": rows}
    ledger.save()
    title = f"{task.name}: every method at the rho of best validation accuracy, {seeds} seeds, m = {m}"
    plots.comparison(rows, {}, Path(str(ledger.path)).with_suffix(".png"), title, timed=False)


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
    parser.add_argument("--quick", action="store_true", help="two radii, two seeds and six epochs of one data set")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="folder for what is written")
    options = parser.parse_args()
    if options.quick and options.out == RESULTS:
        parser.error("--quick: expected -o, so that it does not mix with the results of the documentation")
    torch.set_num_threads(1)
    task = noisy(load(options.data, options.folder), options.label_noise)
    if options.portrait:
        options.out.mkdir(parents=True, exist_ok=True)
        draw_portrait(task, 0.1, options.micro_batches, options.out / f"{task.name}_portrait.png")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(options.out / f"{task.name}.json", {"data": task.name, "label_noise": options.label_noise})
    if options.sensitivity:
        sensitivity(ledger, task, options.seeds)
        return
    radii, seeds, tuning_seeds = tuple(map(float, options.radii.split(","))), options.seeds, options.tuning_seeds
    if options.quick:
        radii, seeds, tuning_seeds = (0.1, 0.2), 2, 1
    compare(ledger, task, radii, seeds, tuning_seeds, options.micro_batches, 6 if options.quick else None)


if __name__ == "__main__":
    main()
