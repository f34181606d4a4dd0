"""Continue trained generators by the Frechet distance on frozen encoders, against more of the same training.

    python packages/frechet-gan/reproduce/posttraining.py [--quick] [-o FOLDER]

Every seed trains a generator on MNIST (16 x 16), then spends the same CPU time in two ways: more steps of the trainer,
or post-training on two frozen encoders. Encoders that neither saw judge both. Writes `posttraining.json` and `.png`.
"""

import copy
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _options import options, parser
from core_tensor.app.cli import progress
from core_tensor.app.files import write_json
from frechet_gan import EMAPopulation, PosttrainConfig, PostTrainer, encoder_losses, evaluate
from frechet_gan.encoders.adapters import pixels
from frechet_gan.encoders.classifier import train_classifier
from frechet_gan.encoders.frozen import Encoder
from frechet_gan.images.arrays import grid
from frechet_gan.plots import grids_and_pairs
from training import Judge, Task, load_task, new_trainer

POINTS = 2
RATE = 2e-3  # what the pilots of training.py chose


def run(
    task: Task, judge: Judge, encoders: dict[str, Encoder], seed: int, steps: int, more: int, cache: Path
) -> dict[str, Any]:
    """One seed: the trained generator, the same with more training, the same with post-training."""
    trainer = new_trainer(task, "frechet", RATE, seed)
    trained = cache / "mnist" / f"frechet-{RATE:g}-{seed}-{steps}.pt"
    if trained.exists():
        trainer.load(trained)  # a run of training.py
    trainer.train(steps)
    start = trainer.sample(5000)
    # warmup averages the first batches evenly; without it the very first one dominates the moments
    loss = encoder_losses(encoders, task.fit.images, EMAPopulation(0.9, warmup=5000))
    config = PosttrainConfig(batch=512, lr=2e-4, ema=0.9, seed=seed)
    post = PostTrainer(copy.deepcopy(trainer.generator), task.network, loss, config)
    post.warm_up(5000)
    points = [measure(judge, start, 0.0)]
    for i in range(1, POINTS + 1):
        post.train(round(more * i / POINTS))
        points.append(measure(judge, post.sample(5000), post.cpu_seconds))
    spent = trainer.cpu_seconds
    longer = [points[0]]
    for i in range(1, POINTS + 1):
        while trainer.cpu_seconds - spent < post.cpu_seconds * i / POINTS:
            trainer.step()
        longer.append(measure(judge, trainer.sample(5000), trainer.cpu_seconds - spent))
    report = evaluate(post.sample, task.unseen.images[:4000], encoders, dict(judge.encoders), count=2000)
    return {
        "seed": seed,
        "points": {"post-training": points, "more training": longer},
        "train_steps": steps,
        "post_steps": more,
        "cpu_seconds": post.cpu_seconds,
        "alarms": report.alarms,
        "grids": {"trained": start[:100], "post-trained": post.sample(100), "trained longer": trainer.sample(100)},
    }


def measure(judge: Judge, images: torch.Tensor, cpu_seconds: float) -> dict[str, float]:
    """Both judges' distances."""
    return {"cpu_seconds": cpu_seconds, "fd": judge.distance(images), "fd2": judge.distance(images, "judge2")}


def rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Before, post-trained, and trained longer, over the seeds."""
    found = []
    for name, kind, index in (
        ("trained", "post-training", 0),
        ("post-trained", "post-training", -1),
        ("trained longer", "more training", -1),
    ):
        values = {k: [r["points"][kind][index][k] for r in runs] for k in ("fd", "fd2")}
        row = {"generator": name, "seeds": len(runs)}
        for key, seeds in values.items():
            row |= {key: mean(seeds), f"{key}_spread": stdev(seeds) if len(seeds) > 1 else 0.0}
        found.append(row)
    return found


def main() -> None:
    """Three seeds, a table and a picture."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=555, help="generator steps of training")
    arguments.add_argument("--more", type=int, default=60, help="steps of post-training")
    arguments.add_argument(
        "--cache", type=Path, default=Path("out/frechet-gan"), help="where training.py keeps its runs"
    )
    found = options(arguments)
    steps, more, seeds, judge_steps = found.steps, found.more, (1, 2, 3), 600
    if found.quick:
        steps, more, seeds, judge_steps = 100, 10, (1, 2), 150
    task = replace(load_task("mnist"), judge_steps=judge_steps)
    judge = Judge(task)
    labels = task.fit.labels
    assert labels is not None
    encoders: dict[str, Encoder] = {
        "classifier": train_classifier(task.fit.images, labels, steps=judge_steps, seed=1),
        "pixels": pixels,
    }
    runs = [run(task, judge, encoders, s, steps, more, found.cache) for s in progress(seeds, "seeds")]
    grids = runs[0].pop("grids")
    for other in runs[1:]:
        del other["grids"]
    write_json(found.out / "posttraining.json", {"rows": rows(runs), "runs": runs, "judge_accuracy": judge.accuracy})
    series = {}
    for kind in ("post-training", "more training"):
        points = runs[0]["points"][kind]
        for key, name in (("fd2", "judge 2"), ("fd", "judge 1")):
            series[f"{kind}, {name}"] = ([p["cpu_seconds"] for p in points], [p[key] for p in points])
    pictures = {name: grid(images) for name, images in grids.items()}
    grids_and_pairs(pictures, series, found.out / "posttraining.png", xlabel="further CPU seconds")


if __name__ == "__main__":
    main()
