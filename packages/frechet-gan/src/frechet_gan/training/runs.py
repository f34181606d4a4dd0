"""A training run in a folder: checkpoint, history and samples, resumable, and tables of several of them."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from core_tensor.app.cli import progress
from core_tensor.app.files import read_json, write_json

from frechet_gan.distributed import world
from frechet_gan.encoders.classifier import train_classifier
from frechet_gan.encoders.frozen import Encoder, encode, load_encoder
from frechet_gan.evaluation.report import Report
from frechet_gan.frechet.distance import frechet_distance
from frechet_gan.frechet.stats import FeatureStats
from frechet_gan.images.data import Dataset
from frechet_gan.images.files import grid, write_image
from frechet_gan.training.config import TrainConfig
from frechet_gan.training.networks import NetworkConfig
from frechet_gan.training.posttrain import PostTrainer
from frechet_gan.training.trainer import FrechetTrainer

_TAKEN = "out: {} holds a run already; go on with it (resume) or choose another folder"


def heldout_encoder(name: str, data: Dataset, seed: int = 12345) -> Encoder:
    """The encoder a run is measured with, which its generator never sees.

    Args:
        name: A name for `load_encoder`, or `auto`: a classifier trained on the labels; where there are none, the pixels
            of images reduced to 8 x 8.
        data: The real images.
        seed: Seed of that classifier.

    Returns:
        The encoder.
    """
    if name != "auto" or data.labels is None:
        return load_encoder("pixels:8" if name == "auto" else name)
    return train_classifier(data.images, data.labels, width=12, features=48, seed=seed)


def train_run(
    folder: str | os.PathLike[str],
    data: Dataset,
    network: NetworkConfig,
    config: TrainConfig,
    *,
    method: str,
    steps: int,
    every: int,
    heldout: Encoder,
    samples: int = 2000,
    resume: bool = False,
) -> dict[str, Any]:
    """Train, and every so often write checkpoint, history and samples; after a kill, go on to the same result.

    Args:
        folder: Where the run lives.
        data: The real images.
        network: The networks.
        config: How to train.
        method: Name of the method, for tables.
        steps: Generator steps in all.
        every: Steps between measurements.
        heldout: Encoder of the metric.
        samples: Generated images per measurement.
        resume: Go on from the folder's checkpoint if there is one.

    Returns:
        The history: method, configuration and a list of points with `step`, `cpu_seconds` and `fd`.

    Raises:
        ValueError: If the folder holds a run and `resume` is not given.
    """
    folder = Path(folder)
    checkpoint, record = folder / "checkpoint.pt", folder / "history.json"
    trainer = FrechetTrainer(network, data.images, config)
    history: dict[str, Any] = {"method": method, "config": asdict(config), "network": asdict(network), "points": []}
    if checkpoint.exists():
        if not resume:
            raise ValueError(_TAKEN.format(folder))
        trainer.load(checkpoint)
        history = read_json(record)
        # a kill between the two writes leaves a point too many
        history["points"] = [p for p in history["points"] if p["step"] <= trainer.step_count]
    reference = FeatureStats.from_features(encode(heldout, data.images))
    steps_left = progress(range(trainer.step_count, steps), f"train {method}", unit="step")
    for _ in steps_left:
        losses = trainer.step()
        if trainer.step_count % every == 0 or trainer.step_count == steps:
            value = float(frechet_distance(encode(heldout, trainer.sample(samples)).double(), reference))
            point = {"step": trainer.step_count, "cpu_seconds": trainer.cpu_seconds, "fd": value, **losses}
            history["points"].append(point)
            steps_left.set_postfix(fd=f"{value:.3g}")
            if world()[0] == 0:
                write_json(record, history)
                write_image(folder / f"samples_{trainer.step_count:06d}.png", grid(trainer.sample(100)), zoom=3)
            trainer.save(checkpoint)
    return history


def posttrain_run(
    folder: str | os.PathLike[str],
    trainer: PostTrainer,
    report: Callable[[], Report],
    *,
    steps: int,
    every: int = 100,
    resume: bool = False,
) -> dict[str, Any]:
    """Post-train with a report before and after; after a kill, go on to the same result.

    Args:
        folder: Where checkpoint, reports and samples are written.
        trainer: The trainer, before its first step.
        report: Evaluates the trainer's samples.
        steps: Steps in all.
        every: Steps between checkpoints.
        resume: Go on from the folder's checkpoint if there is one.

    Returns:
        The reports `before` and `after`, as dictionaries.

    Raises:
        ValueError: If the folder holds a run and `resume` is not given.
    """
    folder = Path(folder)
    checkpoint, record = folder / "checkpoint.pt", folder / "report.json"
    if checkpoint.exists():
        if not resume:
            raise ValueError(_TAKEN.format(folder))
        trainer.load(checkpoint)
        found: dict[str, Any] = read_json(record)
    else:
        found = {"before": report().as_dict()}
        trainer.warm_up(min(10 * trainer.config.batch, 50_000))
        if world()[0] == 0:
            write_json(record, found)
    for _ in progress(range(trainer.step_count, steps), "posttrain", unit="step"):
        trainer.step()
        if trainer.step_count % every == 0 or trainer.step_count == steps:
            trainer.save(checkpoint)
    found["after"] = report().as_dict()
    if world()[0] == 0:
        write_json(record, found)
        write_image(folder / "samples.png", grid(trainer.sample(100)), zoom=3)
    return found


def summary(histories: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method: mean and spread over its runs, and the ratio to the non-saturating baseline.

    Args:
        histories: Runs; those of one method are its seeds.

    Returns:
        Rows with `method`, `seeds`, `fd`, `spread`, `cpu_s`, `ms_per_step`, `ratio_to_ns`, `cost_to_ns`.
    """
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(h["method"] for h in histories):
        last = [h["points"][-1] for h in histories if h["method"] == method]
        values = torch.tensor([p["fd"] for p in last], dtype=torch.float64)
        cpu = sum(p["cpu_seconds"] for p in last) / len(last)
        rows.append(
            {
                "method": method,
                "seeds": len(last),
                "fd": float(values.mean()),
                "spread": float(values.std()) if len(last) > 1 else 0.0,
                "cpu_s": cpu,
                "ms_per_step": 1000 * cpu / last[0]["step"],
            }
        )
    base = next((r for r in rows if r["method"] == "ns"), None)
    for row in rows:
        row["ratio_to_ns"] = None if base is None else row["fd"] / base["fd"]
        row["cost_to_ns"] = None if base is None else row["ms_per_step"] / base["ms_per_step"]
    return rows


def read_histories(folders: Iterable[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Histories of runs.

    Args:
        folders: Folders of `train_run`.

    Returns:
        Their histories.

    Raises:
        ValueError: If a folder holds no run.
    """
    found = []
    for folder in folders:
        path = Path(folder) / "history.json"
        if not path.exists():
            raise ValueError(f"{folder}: expected the folder of a run with history.json")
        history = read_json(path)
        if not isinstance(history, dict) or not history.get("points"):
            raise ValueError(f"{path}: expected the history of a run")
        found.append(history)
    return found
