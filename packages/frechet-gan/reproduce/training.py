"""Transport losses in the last feature layer, as the paper has them, against adversarial baselines at equal CPU time.

Judged by encoders no generator ever saw; no average of weights. The default loss, over every layer: `layers.py`.

    python packages/frechet-gan/reproduce/training.py [--task mnist] [--seconds 9]
    python packages/frechet-gan/reproduce/training.py --quick -o /tmp/training    # a look at the whole in a minute

1. Cost: CPU time per generator step of every method, the least of many short turns; a method's number of steps is the
   budget over its cost, so that a result depends on the seed and not on what else the machine was doing.
2. Learning rate: the same grid for every method and task, with a pilot seed that is not reported.
3. Runs: three seeds per method. Every run is a file in the cache, so a killed script loses one run.
4. Results: `results/training.json` and pictures.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from _options import options, parser
from core_tensor.app.cli import progress
from core_tensor.app.files import atomic_path, write_json
from core_tensor.dev.testing import shared_data
from frechet_gan import PRESETS, FeatureStats, FrechetTrainer, NetworkConfig, frechet_distance
from frechet_gan.encoders.classifier import accuracy, train_classifier
from frechet_gan.encoders.frozen import Encoder, encode
from frechet_gan.images.arrays import grid
from frechet_gan.images.data import Dataset, cifar, glyphs, mnist
from frechet_gan.plots import curve_figure, tiles

METHODS = ("frechet", "ot", "sliced", "max-sliced", "ns", "hinge", "wgan-gp")
PILOT = 100
POINTS = 3  # measurements along a run
SAMPLES = 5000


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    seconds: float
    pilot_seconds: float
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    seeds: tuple[int, ...] = (1, 2, 3)
    rounds: int = 15
    judge_steps: int = 1000


@dataclass(frozen=True)
class Task:
    """Images to fit, and unseen images to judge by."""

    fit: Dataset
    unseen: Dataset
    batch: int = 128
    judge_steps: int = 1000

    @property
    def network(self) -> NetworkConfig:
        """The networks: a feature space of a quarter of the batch, or the batch's moments would mean little."""
        return NetworkConfig("mlp", 16, self.fit.images.shape[1], width=128, features=self.batch // 4)


def load_task(name: str) -> Task:
    """All at 16 x 16 pixels."""
    if name == "mnist":
        fit, unseen = (mnist(shared_data("mnist"), part).resized(16) for part in ("train", "t10k"))
        return Task(fit.part(slice(20_000)), unseen)
    if name == "glyphs":
        data = glyphs(16)
        return Task(data.part(slice(0, None, 2)), data.part(slice(1, None, 2)))
    archive = shared_data("cifar10_subset", "cifar10_subset_jpeg.npz")
    fit, unseen = (cifar(archive, part).resized(16) for part in ("train", "test"))
    return Task(fit, unseen)


class Judge:
    """Two classifiers, independent of every run, and the statistics of unseen real images in their features."""

    def __init__(self, task: Task) -> None:
        labels = task.fit.labels
        shapes = {
            "judge": {"width": 12, "features": 48, "seed": 99},
            "judge2": {"width": 16, "features": 64, "seed": 7},
        }
        self.encoders: dict[str, Encoder] = {}
        self.accuracy: dict[str, float] = {}
        for name, shape in shapes.items():
            network = train_classifier(task.fit.images, labels, steps=task.judge_steps, **shape)
            self.encoders[name] = network
            self.accuracy[name] = accuracy(network, task.unseen.images, task.unseen.labels)
        self.reference = {
            n: FeatureStats.from_features(encode(e, task.unseen.images)) for n, e in self.encoders.items()
        }

    def distance(self, images: torch.Tensor, name: str = "judge") -> float:
        """Frechet distance of images to the unseen real ones."""
        return float(frechet_distance(encode(self.encoders[name], images).double(), self.reference[name]))


def new_trainer(task: Task, method: str, rate: float, seed: int) -> FrechetTrainer:
    """A run's trainer: what the preset says, and spectral norm for hinge."""
    network = replace(task.network, spectral_norm=method == "hinge")
    preset = PRESETS["frechet-features" if method == "frechet" else method]
    config = replace(preset, batch=task.batch, lr_g=rate, lr_d=rate, ema=0.0, seed=seed)
    return FrechetTrainer(network, task.fit.images, config)


def costs(task: Task, methods: tuple[str, ...], rounds: int, steps: int = 4) -> dict[str, float]:
    """CPU seconds per generator step, all methods in turns: the least of the rounds."""
    trainers = {m: new_trainer(task, m, 5e-4, 0) for m in methods}
    found: dict[str, list[float]] = {m: [] for m in methods}
    for trainer in trainers.values():
        trainer.step()  # allocations
    for _ in range(rounds):
        for method, trainer in trainers.items():
            before = trainer.cpu_seconds
            trainer.train(trainer.step_count + steps)
            found[method].append((trainer.cpu_seconds - before) / steps)
    return {method: min(values) for method, values in found.items()}


def run(task: Task, judge: Judge, method: str, rate: float, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """One run, or what an earlier call of it wrote; a pilot is measured once."""
    stem = f"{method}-{rate:g}-{seed}-{steps}"
    record = folder / f"{stem}.json"
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    trainer = new_trainer(task, method, rate, seed)
    points, grids = [], []
    parts = 1 if seed == PILOT else POINTS
    for i in range(1, parts + 1):
        trainer.train(round(steps * i / parts))
        images = trainer.sample(SAMPLES if i == parts else SAMPLES // 2)
        point = {"step": trainer.step_count, "cpu_seconds": trainer.cpu_seconds, "fd": judge.distance(images)}
        points.append(point)
        grids.append(((images[:64] + 1) * 127.5).round().to(torch.uint8).numpy())
    result = {"method": method, "rate": rate, "seed": seed, "points": points, "fd2": judge.distance(images, "judge2")}
    trainer.save(folder / f"{stem}.pt")
    with atomic_path(folder / f"{stem}.npz") as temporary:
        np.savez_compressed(temporary, grids=np.stack(grids))
    write_json(record, result)
    return result


def tune(
    task: Task, judge: Judge, steps: dict[str, int], rates: tuple[float, ...], folder: Path
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The learning rate of every method with the least distance on the pilot seed, and the whole grid."""
    rows = []
    for r, m in progress([(r, m) for r in rates for m in steps], "pilots", unit="run"):
        found = run(task, judge, m, r, PILOT, steps[m], folder)
        rows.append({"method": m, "rate": r, "fd": found["points"][-1]["fd"]})
    best = {m: min((row for row in rows if row["method"] == m), key=lambda row: row["fd"])["rate"] for m in steps}
    return best, rows


def experiment(name: str, methods: tuple[str, ...], plan: Plan, cache: Path) -> None:
    """Costs, pilots and runs of one task, into the cache."""
    task = replace(load_task(name), judge_steps=plan.judge_steps)
    judge = Judge(task)
    folder = cache / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "costs.json").exists():
        write_json(folder / "costs.json", costs(task, methods, plan.rounds))
    cost = json.loads((folder / "costs.json").read_text())
    steps = {m: round(plan.seconds / cost[m]) for m in methods}
    best, pilots = tune(task, judge, {m: round(plan.pilot_seconds / cost[m]) for m in methods}, plan.rates, folder)
    for seed, m in progress([(s, m) for s in plan.seeds for m in methods], f"{name}: runs", unit="run"):
        run(task, judge, m, best[m], seed, steps[m], folder)
    real = judge.distance(task.fit.images[:SAMPLES])
    real2 = judge.distance(task.fit.images[:SAMPLES], "judge2")
    info = {
        "network": asdict(task.network), "batch": task.batch,
        "seconds": plan.seconds, "pilot_seconds": plan.pilot_seconds, "seeds": plan.seeds,
        "cost_ms": {m: 1000 * s for m, s in cost.items()}, "steps": steps,
        "rate": best, "pilots": pilots,
        "judge_accuracy": judge.accuracy, "real_fd": real, "real_fd2": real2,
        "fit": len(task.fit.images), "unseen": len(task.unseen.images),
    }  # fmt: skip
    write_json(folder / "task.json", info)


def rows(info: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per method: both judges' distances, their spread over the seeds, and ratios to the baseline `ns`."""
    found = []
    last = {key: {m: _last(runs[m], key) for m in runs} for key in ("fd", "fd2")}
    for m in runs:
        row: dict[str, Any] = {"method": m, "rate": info["rate"][m], "steps": info["steps"][m], "seeds": len(runs[m])}
        for key, values in last.items():
            ratios = [x / y for x, y in zip(values[m], last[key]["ns"], strict=False)]
            row |= {
                key: mean(values[m]), f"{key}_spread": stdev(values[m]) if len(values[m]) > 1 else None,
                f"{key}_ratio": mean(values[m]) / mean(last[key]["ns"][: len(values[m])]),
                f"{key}_ratio_range": f"{min(ratios):.2f} to {max(ratios):.2f}",
            }  # fmt: skip
        row |= {"cost_ms": info["cost_ms"][m], "cost_ratio": info["cost_ms"][m] / info["cost_ms"]["ns"]}
        found.append(row)
    return found


def _last(runs: list[dict[str, Any]], key: str) -> list[float]:
    return [r["points"][-1]["fd"] if key == "fd" else r["fd2"] for r in runs]


def write_results(cache: Path, out: Path) -> None:
    """`training.json`, and for every task curves and the samples of seed 1."""
    result = {}
    for path in sorted(cache.glob("*/task.json")):
        name, info = path.parent.name, json.loads(path.read_text())
        stems = {m: [f"{m}-{info['rate'][m]:g}-{s}-{info['steps'][m]}" for s in info["seeds"]] for m in info["steps"]}
        runs = {m: [json.loads((path.parent / f"{s}.json").read_text()) for s in stems[m]] for m in stems}
        result[name] = {**info, "rows": rows(info, runs), "runs": [r for found in runs.values() for r in found]}
        curve_figure([r for found in runs.values() for r in found], out / f"training_{name}.png")
        samples = {"real": load_task(name).fit.images[:64]}
        for m in stems:
            with np.load(path.parent / f"{stems[m][0]}.npz") as file:
                samples[f"{m}, distance {runs[m][0]['points'][-1]['fd']:.3g}"] = (
                    torch.from_numpy(file["grids"][-1]).float() / 127.5 - 1
                )
        tiles({title: grid(images, 8) for title, images in samples.items()}, out / f"samples_{name}.png")
    write_json(out / "training.json", result)


def main() -> None:
    """Run what is missing, then write results."""
    arguments = parser(__doc__)
    arguments.add_argument("--task", action="append", choices=("mnist", "glyphs", "cifar"), help="all if not given")
    arguments.add_argument("--method", action="append", choices=METHODS, help="all if not given")
    arguments.add_argument("--seconds", type=float, default=9.0, help="CPU seconds per run")
    arguments.add_argument("--pilot-seconds", type=float, default=6.0, help="CPU seconds per pilot run")
    arguments.add_argument("--cache", type=Path, default=Path("out/frechet-gan"), help="where runs are kept")
    found = options(arguments)
    plan, cache = Plan(found.seconds, found.pilot_seconds), found.cache
    if found.quick:
        plan = Plan(0.4, 0.2, rates=(1e-3,), seeds=(1, 2), rounds=3, judge_steps=150)
        cache = found.out / "training-runs"
    for name in found.task or ("mnist", "glyphs", "cifar"):
        experiment(name, tuple(found.method or METHODS), plan, cache)
    write_results(cache, found.out)


if __name__ == "__main__":
    main()
