"""The two demonstrations: Frechet against the non-saturating loss on digits, and a gamed encoder."""

from dataclasses import replace
from typing import Any

from core_tensor.app.cli import progress
from torch import Tensor

from frechet_gan.encoders.classifier import accuracy, train_classifier
from frechet_gan.encoders.frozen import encode
from frechet_gan.evaluation.report import evaluate
from frechet_gan.frechet.distance import frechet_distance
from frechet_gan.frechet.stats import FeatureStats
from frechet_gan.images.arrays import grid
from frechet_gan.images.data import Dataset, digits
from frechet_gan.plots import grids_and_curves, grids_and_pairs
from frechet_gan.training.config import PRESETS, TrainConfig
from frechet_gan.training.networks import NetworkConfig
from frechet_gan.training.trainer import FrechetTrainer
from frechet_gan.transport.loss import TransportLoss
from frechet_gan.transport.populations import EMAPopulation

_NETWORK = NetworkConfig("mlp", size=8, latent=32, width=128, features=32)
_RATES = {"frechet": 2e-3, "ns": 5e-4}
"""Learning rate of each loss: its best of 5e-4, 1e-3, 2e-3 and 4e-3 after 600 steps, on a seed of no demonstration."""


def _labelled_digits() -> tuple[Dataset, Tensor]:
    data = digits()
    assert data.labels is not None
    return data, data.labels


def compare_demo(out: str, seconds: float = 8.0, seeds: int = 3, points: int = 8) -> dict[str, Any]:
    """Train both losses with the same R1-regularised discriminator and CPU time; measure with an unseen classifier.

    Args:
        out: PNG to write.
        seconds: CPU time per run, in seconds.
        seeds: Runs per method.
        points: Measurements per run.

    Returns:
        Headline figures.
    """
    data, labels = _labelled_digits()
    judge = train_classifier(data.images, labels, width=12, features=48, seed=99)
    target = encode(judge, data.images)
    reference = FeatureStats.from_features(target)
    histories: list[dict[str, Any]] = []
    grids = {"real digits": grid(data.images[:100])}
    parts = [(method, seed, i) for seed in range(seeds) for method in ("frechet", "ns") for i in range(1, points + 1)]
    for method, seed, i in progress(parts, "train", unit="part"):
        if i == 1:
            config = replace(PRESETS[method], lr_g=_RATES[method], lr_d=_RATES[method], seed=seed)
            trainer = FrechetTrainer(_NETWORK, data.images, config)
            histories.append({"method": method, "points": []})
        while trainer.cpu_seconds < seconds * i / points:
            trainer.step()
        value = float(frechet_distance(encode(judge, trainer.sample(1797)).double(), reference))
        histories[-1]["points"].append({"step": trainer.step_count, "cpu_seconds": trainer.cpu_seconds, "fd": value})
        if seed == 0 and i == points:
            name = {"frechet": "Fréchet loss", "ns": "non-saturating loss"}[method]
            grids[f"{name}: distance {value:.2f}"] = grid(trainer.sample(100))
    title = "Same networks, same CPU time; distances are measured by an encoder that no generator was trained with"
    grids_and_curves(grids, histories, out, title)

    def mean(method: str) -> float:
        values: list[float] = [h["points"][-1]["fd"] for h in histories if h["method"] == method]
        return sum(values) / len(values)

    return {
        "frechet_fd": mean("frechet"),
        "ns_fd": mean("ns"),
        "ratio": mean("frechet") / mean("ns"),
        "real_halves_fd": float(frechet_distance(target[::2].double(), target[1::2].double())),
        "judge_accuracy": accuracy(judge, data.images, labels),
        "rates": _RATES,
        "seconds_per_run": seconds,
        "seeds": seeds,
        "picture": out,
    }


def hacking_demo(out: str, steps: int = 600, points: int = 8, seed: int = 0) -> dict[str, Any]:
    """Minimise the distance in one frozen, weak encoder from scratch: its score is good, the pictures are noise.

    Beside it, a generator trained in the features of its discriminator, as honest as it gets.

    Args:
        out: PNG to write.
        steps: Generator steps.
        points: Measurements along the way.
        seed: Seed of the runs.

    Returns:
        Headline figures, the alarms, and the points of both runs.
    """
    data, labels = _labelled_digits()
    seen = train_classifier(data.images, labels, width=4, features=16, seed=1)
    unseen = train_classifier(data.images, labels, width=12, features=48, seed=2)
    references = {e: FeatureStats.from_features(encode(e, data.images)) for e in (seen, unseen)}
    loss = TransportLoss(
        encoder=seen, reference=references[seen], population=EMAPopulation(0.9, warmup=0), rescale=True
    )
    config = TrainConfig(seed=seed)
    runs = {
        "gamed": FrechetTrainer(_NETWORK, data.images, config, image_loss=loss),
        "honest": FrechetTrainer(_NETWORK, data.images, config),
    }
    result: dict[str, Any] = {"points": {}}
    pictures, series = {}, {}
    for name, trainer in runs.items():
        found = result["points"][name] = []
        for i in progress(range(1, points + 1), f"train {name}", unit="part"):
            trainer.train(round(steps * i / points))
            images = trainer.sample(1797)
            distances = [float(frechet_distance(encode(e, images).double(), r)) for e, r in references.items()]
            found.append({"step": trainer.step_count, "seen": distances[0], "heldout": distances[1]})
        report = evaluate(trainer.sample, data.images, {"trained with": seen}, {"held out": unseen}, count=1797)
        last = found[-1]
        result |= {f"{name}_seen_fd": last["seen"], f"{name}_heldout_fd": last["heldout"]}
        result[f"{name}_alarms"] = report.alarms
        pictures[f"{name}: {last['seen']:.1f} seen, {last['heldout']:.1f} held out"] = grid(trainer.sample(100))
        for kind in ("seen", "heldout"):
            label = f"{name}, {'gamed' if kind == 'seen' else 'held-out'} encoder"
            series[label] = ([p["step"] for p in found], [p[kind] for p in found])
    grids_and_pairs(pictures, series, out)
    return {**result, "picture": out}
