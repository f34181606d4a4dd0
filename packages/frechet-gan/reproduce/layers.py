"""The default loss, over every layer, against baselines and controls at equal CPU time, judged by unseen encoders.

    python packages/frechet-gan/reproduce/layers.py [--task mnist] [--seconds 6] [--limit 600]
    python packages/frechet-gan/reproduce/layers.py --quick -o /tmp/layers    # a look at the whole thing in a minute

As `training.py` (costs in turns give every method its number of steps; learning rates by one grid on a pilot seed,
which goes on where its edge is the best; one file per run, so that a killed script loses one run), but with five
seeds, averaged and current generators measured for every method, and controls: the layers matched by transport
instead (`ot-layers`), the non-saturating loss with the layers added (`ns-layers`), and `hinge` with spectral norm.
Twenty minutes of CPU time; `--limit` cuts it into pieces. Writes `layers.json` and `layers_<task>.png`.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean, mean, stdev
from typing import Any

import torch
from _options import options, parser
from core_tensor.app.cli import progress
from core_tensor.app.files import write_json
from frechet_gan import PRESETS, FrechetTrainer, sample_images
from frechet_gan.choices import METHODS as ALL
from frechet_gan.images.arrays import grid
from frechet_gan.plots import tiles
from training import PILOT, SAMPLES, Judge, Task, load_task

METHODS = ("frechet", "ns", "wgan-gp", "ns-layers", "ot-layers", "hinge")
TASKS = ("mnist", "glyphs", "cifar")


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    seconds: float
    pilot_seconds: float
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    further: int = 3  # rates beyond the grid, while its edge is the best
    rounds: int = 40
    judge_steps: int = 1000


def new_trainer(task: Task, method: str, rate: float, seed: int) -> FrechetTrainer:
    """A run's trainer: what the preset says, at a learning rate."""
    config = replace(PRESETS[method], batch=task.batch, lr_g=rate, lr_d=rate, seed=seed)
    network = replace(task.network, spectral_norm=method == "hinge")
    return FrechetTrainer(network, task.fit.images, config)


def costs(task: Task, rounds: int, steps: int = 4) -> dict[str, float]:
    """CPU seconds per generator step, all methods in turns: the least of the rounds."""
    trainers = {m: new_trainer(task, m, 1e-3, 0) for m in METHODS}
    found: dict[str, list[float]] = {m: [] for m in METHODS}
    for _ in range(rounds):
        for method, trainer in trainers.items():
            before = trainer.cpu_seconds
            trainer.train(trainer.step_count + steps)
            found[method].append((trainer.cpu_seconds - before) / steps)
    return {method: min(values) for method, values in found.items()}


def run(task: Task, judge: Judge, method: str, rate: float, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Distances of both generators in both judges, or what an earlier call wrote."""
    record = folder / f"{method}-{rate:g}-{seed}-{steps}.json"
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    trainer = new_trainer(task, method, rate, seed)
    trainer.train(steps)
    sides = {"averaged": trainer.sample(SAMPLES), "current": sample_images(trainer.generator, trainer.latent, SAMPLES)}
    distances = {kind: [judge.distance(x, name) for name in judge.encoders] for kind, x in sides.items()}
    result = {
        "method": method,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "cpu_seconds": trainer.cpu_seconds,
        **distances,
    }
    if seed == 1:
        torch.save(sides["averaged"][:64], record.with_suffix(".pt"))
    write_json(record, result)
    return result


def score(found: dict[str, Any]) -> float:
    """What learning rates are chosen by: the better of the two generators, in the mean of the judges."""
    return min(geometric_mean(found[kind]) for kind in ("averaged", "current"))


def beyond(found: dict[float, dict[str, Any]], plan: Plan) -> list[float]:
    """The next learning rate beyond the grid, where its edge is the best so far."""
    if len(found) >= len(plan.rates) + plan.further:
        return []
    least, most = min(found), max(found)
    best = min(found, key=lambda rate: score(found[rate]))
    return [least / 2] if best == least else [most * 2] if best == most else []


def experiment(name: str, plan: Plan, cache: Path, until: float) -> bool:
    """Costs, pilots and runs of one task, into the cache; whether all are there."""
    task = replace(load_task(name), judge_steps=plan.judge_steps)
    folder = cache / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "costs.json").exists():
        write_json(folder / "costs.json", costs(task, plan.rounds))
    cost = json.loads((folder / "costs.json").read_text())
    judge = Judge(task)
    pilots: dict[str, dict[float, dict[str, Any]]] = {m: {} for m in METHODS}
    jobs = [(r, m) for r in plan.rates for m in METHODS]
    while jobs:
        for rate, m in progress(jobs, f"{name}: pilots", unit="run"):
            if time.monotonic() > until:
                return False
            pilots[m][rate] = run(task, judge, m, rate, PILOT, round(plan.pilot_seconds / cost[m]), folder)
        jobs = [(rate, m) for m, found in pilots.items() for rate in beyond(found, plan)]
    best = {m: min(found, key=lambda r: score(found[r])) for m, found in pilots.items()}
    for seed, m in progress([(s, m) for s in plan.seeds for m in METHODS], f"{name}: runs", unit="run"):
        if time.monotonic() > until:
            return False
        run(task, judge, m, best[m], seed, round(plan.seconds / cost[m]), folder)
    real = [judge.distance(task.fit.images[:SAMPLES], name) for name in judge.encoders]
    info = {
        "seconds": plan.seconds, "pilot_seconds": plan.pilot_seconds, "rate": best, "real": real,
        "seeds": plan.seeds, "at_edge": [m for m, r in best.items() if r in (min(pilots[m]), max(pilots[m]))],
        "cost_ms": {m: 1000 * s for m, s in cost.items()},
        "steps": {m: round(plan.seconds / s) for m, s in cost.items()},
        "accuracy": judge.accuracy,
        "pilots": {m: {f"{r:g}": score(found[r]) for r in sorted(found)} for m, found in pilots.items()},
    }  # fmt: skip
    write_json(folder / "task.json", info)
    return True


def rows(info: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per method and generator: both judges, and the default's distance over it, with the range over seeds."""
    found = []
    for m in METHODS:
        for kind in ("averaged", "current"):
            values = [r[kind] for r in runs[m]]
            ours = [geometric_mean(r[kind]) for r in runs["frechet"]]
            ratios = [a / geometric_mean(b) for a, b in zip(ours, values, strict=True)]
            found.append({
                "method": m, "generator": kind, "seeds": len(values),
                "rate": info["rate"][m], "steps": info["steps"][m],
                "judge1": mean(v[0] for v in values), "judge1_spread": stdev(v[0] for v in values),
                "judge2": mean(v[1] for v in values), "judge2_spread": stdev(v[1] for v in values),
                "ratio": geometric_mean(ratios), "ratio_range": f"{min(ratios):.2f} to {max(ratios):.2f}",
                "worst": max(ratios), "cost_ratio": info["cost_ms"][m] / info["cost_ms"]["ns"],
            })  # fmt: skip
    return found


def write_results(cache: Path, out: Path) -> None:
    """`layers.json`, and for every task the samples of the first seed."""
    result = {}
    for name in TASKS:
        path = cache / name / "task.json"
        if not path.exists():
            continue
        info = json.loads(path.read_text())
        stems = {m: [f"{m}-{info['rate'][m]:g}-{s}-{info['steps'][m]}" for s in info["seeds"]] for m in METHODS}
        runs = {m: [json.loads((path.parent / f"{s}.json").read_text()) for s in stems[m]] for m in METHODS}
        result[name] = {**info, "rows": rows(info, runs), "runs": [r for found in runs.values() for r in found]}
        pictures = {"real": grid(load_task(name).fit.images[:64], 8)}
        for m in METHODS:
            images = torch.load(path.parent / f"{stems[m][0]}.pt", weights_only=True)
            pictures[f"{m}, distance {runs[m][0]['averaged'][0]:.3g}"] = grid(images, 8)
        tiles(pictures, out / f"layers_{name}.png", columns=4)
    write_json(out / "layers.json", result)


def main() -> None:
    """Run what is missing, then write results."""
    arguments = parser(__doc__)
    arguments.add_argument("--task", action="append", choices=TASKS, help="all if not given")
    arguments.add_argument("--seconds", type=float, default=6.0, help="CPU seconds per run")
    arguments.add_argument("--pilot-seconds", type=float, default=3.0, help="CPU seconds per pilot run")
    arguments.add_argument("--limit", type=float, default=float("inf"), help="begin no run after so many seconds")
    arguments.add_argument("--cache", type=Path, default=Path("out/frechet-gan-layers"), help="where runs are kept")
    found = options(arguments)
    plan, cache = Plan(found.seconds, found.pilot_seconds), found.cache
    if found.quick:
        plan = Plan(0.5, 0.25, rates=(1e-3, 2e-3), seeds=(1, 2), further=0, rounds=3, judge_steps=150)
        cache = found.out / "layers-runs"
    until = time.monotonic() + found.limit
    assert set(METHODS) <= set(ALL)
    if all(experiment(t, plan, cache, until) for t in found.task or TASKS):
        write_results(cache, found.out)


if __name__ == "__main__":
    main()
