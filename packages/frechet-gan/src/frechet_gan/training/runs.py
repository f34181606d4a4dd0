"""A training run in a folder: checkpoint, history and samples, continued after a kill; tables of several runs."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from core_tensor.app.cli import progress
from core_tensor.app.files import digest, read_json, write_json
from core_tensor.app.runs import RunFolder

from frechet_gan.encoders.classifier import train_classifier
from frechet_gan.encoders.frozen import Encoder, encode
from frechet_gan.encoders.registry import load_encoder
from frechet_gan.evaluation.report import Report
from frechet_gan.frechet.distance import frechet_distance
from frechet_gan.frechet.stats import FeatureStats
from frechet_gan.images.arrays import grid
from frechet_gan.images.data import Dataset
from frechet_gan.images.files import write_image
from frechet_gan.training.config import TrainConfig
from frechet_gan.training.networks import NetworkConfig
from frechet_gan.training.posttrain import PostTrainer
from frechet_gan.training.trainer import FrechetTrainer

CHECKPOINT, HISTORY, REPORT = "checkpoint.pt", "history.json", "report.json"


def heldout_encoder(name: str, data: Dataset, seed: int = 12345, device: str = "cpu") -> Encoder:
    """The encoder a run is measured with, which its generator never sees.

    Args:
        name: A name for `load_encoder`, or `auto`: a classifier trained on the labels; where there are none, the pixels
            of images reduced to 8 x 8.
        data: The real images.
        seed: Seed of that classifier.
        device: Where it runs.

    Returns:
        The encoder.
    """
    if name != "auto" or data.labels is None:
        return load_encoder("pixels:8" if name == "auto" else name, device=device)
    return train_classifier(data.images, data.labels, width=12, features=48, seed=seed).to(device)


def data_digest(data: Dataset) -> str:
    """Digest of images and labels, which a run folder records: other data of the same shape is another run."""
    return digest(data.images, data.labels)


def train_run(
    run: RunFolder,
    data: Dataset,
    network: NetworkConfig,
    config: TrainConfig,
    *,
    method: str,
    steps: int,
    every: int,
    heldout: Encoder,
    samples: int = 2000,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train, and every so often write checkpoint, history and samples; resume after a kill to the same result.

    Args:
        run: The claimed folder.
        data: The real images.
        network: The networks.
        config: How to train.
        method: Name of the method, for tables.
        steps: Generator steps in all.
        every: Steps between measurements.
        heldout: Encoder of the metric.
        samples: Generated images per measurement.
        device: Where to train.

    Returns:
        The history: method, configuration and a list of points with `step`, `cpu_seconds` and `fd`.
    """
    checkpoint, record = run.path / CHECKPOINT, run.path / HISTORY
    trainer = FrechetTrainer(network, data.images, config, device=device)
    history: dict[str, Any] = {"method": method, "config": asdict(config), "network": asdict(network), "points": []}
    if checkpoint.exists():
        trainer.load(checkpoint)
        history = read_history(run.path)
        # a kill between the two writes leaves a point too many
        history["points"] = [p for p in history["points"] if p["step"] <= trainer.step_count]
    reference = FeatureStats.from_features(encode(heldout, data.images, device=device))
    steps_left = progress(range(trainer.step_count, steps), f"train {method}", unit="step")
    for _ in steps_left:
        losses = trainer.step()
        if trainer.step_count % every == 0 or trainer.step_count == steps:
            features = encode(heldout, trainer.sample(samples), device=device)
            value = float(frechet_distance(features.double(), reference))
            point = {"step": trainer.step_count, "cpu_seconds": trainer.cpu_seconds, "fd": value, **losses}
            history["points"].append(point)
            steps_left.set_postfix(fd=f"{value:.3g}")
            if run.ranks.first:
                write_json(record, history)
                write_image(run.path / f"samples_{trainer.step_count:06d}.png", grid(trainer.sample(100)), zoom=3)
            trainer.save(checkpoint)
    run.finish(history["points"][-1])
    return history


def posttrain_run(
    run: RunFolder, trainer: PostTrainer, report: Callable[[], Report], *, steps: int, every: int = 100
) -> dict[str, Any]:
    """Post-train with a report before and after; resume after a kill to the same result.

    Args:
        run: The claimed folder.
        trainer: The trainer, before its first step.
        report: Evaluates the trainer's samples.
        steps: Steps in all.
        every: Steps between checkpoints.

    Returns:
        The reports `before` and `after`, as dictionaries.
    """
    checkpoint, record = run.path / CHECKPOINT, run.path / REPORT
    found: dict[str, Any]
    if checkpoint.exists():
        trainer.load(checkpoint)
        found = read_report(run.path)
    else:
        found = {"before": report().as_dict()}
        trainer.warm_up(min(10 * trainer.config.batch, 50_000))
        if run.ranks.first:
            write_json(record, found)
    for _ in progress(range(trainer.step_count, steps), "posttrain", unit="step"):
        trainer.step()
        if trainer.step_count % every == 0 or trainer.step_count == steps:
            trainer.save(checkpoint)
    found["after"] = report().as_dict()
    if run.ranks.first:
        write_json(record, found)
        write_image(run.path / "samples.png", grid(trainer.sample(100)), zoom=3)
    run.finish(found)
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
        row["ratio_to_ns"] = None if base is None or not base["fd"] else row["fd"] / base["fd"]
        row["cost_to_ns"] = (
            None if base is None or not base["ms_per_step"] else row["ms_per_step"] / base["ms_per_step"]
        )
    return rows


def read_histories(folders: Iterable[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Histories of runs.

    Args:
        folders: Folders of `train_run`.

    Returns:
        Their histories.
    """
    return [read_history(folder) for folder in folders]


def read_history(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The history of a run.

    Args:
        folder: Folder of `train_run`.

    Returns:
        The history: method and points with step, CPU seconds and distance, and what else the file holds.

    Raises:
        ValueError: If the folder holds no run, or its history is broken.
    """
    path = Path(folder) / HISTORY
    if not path.exists():
        raise ValueError(f"{folder}: expected the folder of a run with {HISTORY}")
    history = read_json(path)
    if not isinstance(history, dict) or not isinstance(history.get("method"), str):
        raise ValueError(f"{path}: expected the history of a run (method, points)")
    points = history.get("points")
    if not isinstance(points, list) or not points or not all(_is_point(point) for point in points):
        raise ValueError(f"{path}: expected points with a step from 1, cpu_seconds and fd")
    return history


def _is_point(point: Any) -> bool:
    """Whether a point of a history can be drawn and tabulated."""
    if not isinstance(point, dict) or type(point.get("step")) is not int or not 1 <= point["step"] < 2**53:
        return False
    values: list[Any] = [point.get(name) for name in ("cpu_seconds", "fd")]
    return all(type(v) in (int, float) and math.isfinite(v) and 0 <= v < 1e300 for v in values)


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The report that post-training began with.

    Args:
        folder: Folder of `posttrain_run`.

    Returns:
        The reports by name, `before` at least.

    Raises:
        ValueError: If the file is not such a report.
    """
    path = Path(folder) / REPORT
    found = read_json(path)
    before = found.get("before") if isinstance(found, dict) else None
    encoders = before.get("encoders") if isinstance(before, dict) else None
    if not isinstance(encoders, list) or not all(isinstance(e, dict) and "encoder" in e for e in encoders):
        raise ValueError(f"{path}: expected the report of post-training")
    return dict(found)
