"""The two demonstrations: Frechet against the non-saturating loss on digits, and a gamed encoder."""

from dataclasses import replace
from typing import Any

from core_tensor.cli import progress
from torch import Tensor, nn

from frechet_gan.classifier import accuracy, train_classifier
from frechet_gan.data import Dataset, digits
from frechet_gan.distance import frechet_distance
from frechet_gan.encoders import encode
from frechet_gan.evaluation import evaluate
from frechet_gan.images import grid
from frechet_gan.loss import TransportLoss
from frechet_gan.networks import NetworkConfig
from frechet_gan.plots import grids_and_curves
from frechet_gan.populations import EMAPopulation
from frechet_gan.stats import FeatureStats
from frechet_gan.trainer import PRESETS, FrechetTrainer, TrainConfig

_NETWORK = NetworkConfig("mlp", size=8, latent=32, width=128, features=64)


def _labelled_digits() -> tuple[Dataset, Tensor]:
    data = digits()
    assert data.labels is not None
    return data, data.labels


def compare_demo(out: str, seconds: float = 4.0, seeds: int = 3, points: int = 8) -> dict[str, Any]:
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
    runs = [(method, seed) for seed in range(seeds) for method in ("frechet", "ns")]
    for method, seed in progress(runs, "train", unit="run"):
        trainer = FrechetTrainer(_NETWORK, data.images, replace(PRESETS[method], seed=seed))
        history: dict[str, Any] = {"method": method, "points": []}
        for i in range(1, points + 1):
            while trainer.cpu_seconds < seconds * i / points:
                trainer.step()
            value = float(frechet_distance(encode(judge, trainer.sample(1797)).double(), reference))
            history["points"].append({"step": trainer.step_count, "cpu_seconds": trainer.cpu_seconds, "fd": value})
        histories.append(history)
        if seed == 0:
            name = {"frechet": "Fréchet loss", "ns": "non-saturating loss"}[method]
            grids[f"{name}, held-out FD {value:.2f}"] = grid(trainer.sample(100))
    grids_and_curves(
        grids, histories, out, "Same discriminator, same CPU time; the metric's encoder was never trained on"
    )

    def mean(method: str) -> float:
        values: list[float] = [h["points"][-1]["fd"] for h in histories if h["method"] == method]
        return sum(values) / len(values)

    return {
        "frechet_fd": mean("frechet"),
        "ns_fd": mean("ns"),
        "ratio": mean("frechet") / mean("ns"),
        "real_halves_fd": float(frechet_distance(target[::2].double(), target[1::2].double())),
        "judge_accuracy": accuracy(judge, data.images, labels),
        "seconds_per_run": seconds,
        "seeds": seeds,
        "picture": out,
    }


def hacking_demo(out: str, steps: int = 600) -> dict[str, Any]:
    """Minimise the distance in one frozen, weak encoder from scratch: its score is good, the pictures are noise.

    Args:
        out: PNG to write.
        steps: Generator steps.

    Returns:
        Headline figures and the alarms.
    """
    data, labels = _labelled_digits()
    seen = train_classifier(data.images, labels, seed=1)
    unseen = train_classifier(data.images, labels, width=12, features=48, seed=2)
    loss = TransportLoss(
        encoder=seen,
        reference=FeatureStats.from_features(encode(seen, data.images)),
        population=EMAPopulation(0.9, warmup=0),
        rescale=True,
    )
    plain = NetworkConfig("mlp", size=8, latent=32, width=128)
    gamed = FrechetTrainer(plain, data.images, TrainConfig(), image_loss=loss)
    honest = FrechetTrainer(plain, data.images, PRESETS["frechet"])
    for trainer in (gamed, honest):
        for _ in progress(range(steps), "train", unit="step"):
            trainer.step()
    encoders: dict[str, nn.Module] = {"trained with": seen}
    held = {"held out": unseen}
    reports = {
        name: evaluate(lambda n, s, t=t: t.sample(n, s), data.images, encoders, held, count=1797)  # type: ignore[misc]
        for name, t in (("gamed", gamed), ("honest", honest))
    }
    titles = {
        name: f"{name}: FD {r.encoders[0].distance['plugin']:.1f} seen, {r.encoders[1].distance['plugin']:.1f} held out"
        for name, r in reports.items()
    }
    pictures = {titles["gamed"]: grid(gamed.sample(100)), titles["honest"]: grid(honest.sample(100))}
    grids_and_curves(pictures, [], out)
    return {
        **{
            f"{name}_{kind}_fd": view.distance["plugin"]
            for name, r in reports.items()
            for kind, view in zip(("seen", "heldout"), r.encoders, strict=True)
        },
        "gamed_alarms": reports["gamed"].alarms,
        "honest_alarms": reports["honest"].alarms,
        "picture": out,
    }
