"""A training run in a folder: checkpoint, history and samples, resumable, and tables of several of them."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from core_tensor.cli import progress
from core_tensor.files import read_json, write_json
from torch import Tensor

from frechet_gan.classifier import train_classifier
from frechet_gan.data import Dataset
from frechet_gan.distance import frechet_distance
from frechet_gan.distributed import world
from frechet_gan.encoders import Encoder, encode, load_encoder, pixels
from frechet_gan.images import grid, write_image
from frechet_gan.networks import NetworkConfig
from frechet_gan.stats import FeatureStats
from frechet_gan.trainer import FrechetTrainer, TrainConfig


def heldout_encoder(name: str, data: Dataset, seed: int = 12345) -> Encoder:
    """The encoder a run is measured with, which its generator never sees.

    Args:
        name: A name for `load_encoder`, or `auto`: a classifier trained on the labels, pixels where there are none.
        data: The real images.
        seed: Seed of that classifier.

    Returns:
        The encoder.
    """
    if name != "auto":
        return load_encoder(name)
    if data.labels is None:
        return pixels
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
            raise ValueError(f"out: {folder} holds a run already; go on with it (resume) or choose another folder")
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


def train_until(
    trainer: FrechetTrainer, cpu_seconds: float, heldout: Encoder, reference: FeatureStats, points: int
) -> list[dict[str, float]]:
    """Train for a budget of CPU time, for comparisons at equal cost.

    Args:
        trainer: The trainer.
        cpu_seconds: CPU time of training, in seconds (measurements are not counted).
        heldout: Encoder of the metric.
        reference: Statistics of the real images in it.
        points: Measurements, evenly spaced in CPU time.

    Returns:
        Points with `step`, `cpu_seconds` and `fd`.
    """
    found = []
    for i in range(1, points + 1):
        while trainer.cpu_seconds < cpu_seconds * i / points:
            trainer.step()
        value = float(frechet_distance(encode(heldout, trainer.sample(5000)).double(), reference))
        found.append({"step": trainer.step_count, "cpu_seconds": trainer.cpu_seconds, "fd": value})
    return found


def replaced(config: TrainConfig, **changes: Any) -> TrainConfig:
    """A configuration with the given fields changed where the value is not None.

    Args:
        config: Configuration.
        changes: New values; None keeps the old one.

    Returns:
        A new configuration.
    """
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


def side_by_side(pictures: Sequence[Tensor], margin: int = 6) -> Tensor:
    """Join pictures of equal height.

    Args:
        pictures: Pictures, shape (c, h, w).
        margin: White pixels between them.

    Returns:
        One picture, shape (c, h, W).
    """
    gap = torch.ones(pictures[0].shape[0], pictures[0].shape[1], margin)
    joined = [piece for picture in pictures for piece in (picture, gap)][:-1]
    return torch.cat(joined, 2)
