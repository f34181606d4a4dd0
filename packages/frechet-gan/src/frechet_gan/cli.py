"""The command `frechet-gan`."""

from pathlib import Path

import click
import torch
from core_tensor.cli import command_line, emit, json_option, progress
from torch import Tensor

from frechet_gan.distance import frechet_distance
from frechet_gan.encoders import encode, load_encoder
from frechet_gan.estimators import ESTIMATORS, Estimator, estimate_frechet
from frechet_gan.images import image_batches, image_files
from frechet_gan.stats import FeatureStats

_encoder_option = click.option(
    "--encoder",
    default="efficientnet-lite0",
    help="efficientnet-lite0|1|2, pixels, mobilenet:FILE.npz, torchvision:MODEL, timm:MODEL or dinov2.",
)
_batch_option = click.option("--batch", default=64, type=click.IntRange(1), help="Images per batch.")
_size_option = click.option(
    "--size", type=click.IntRange(1), help="Resize to this height and width, in pixels. [default: sizes must agree]"
)


@command_line("frechet-gan")
def main() -> None:
    """Generators trained by Frechet distance or optimal transport in feature space."""


def _features(folder: str, encoder: str, batch: int, size: int | None) -> Tensor:
    total = -(-len(image_files(folder)) // batch)
    network = load_encoder(encoder)
    return encode(network, progress(image_batches(folder, batch, size), f"encode {folder}", total, "batch"))


@main.command()
@click.argument("images", type=click.Path(exists=True, file_okay=False))
@click.option("--out", "-o", required=True, type=click.Path(dir_okay=False), help="npz file to write.")
@_encoder_option
@_batch_option
@_size_option
@json_option
def stats(images: str, out: str, encoder: str, batch: int, size: int | None, as_json: bool) -> None:
    """Mean and covariance of the features of a folder of IMAGES, as npz (mu, sigma, count)."""
    found = FeatureStats.from_features(_features(images, encoder, batch, size))
    found.save(out)
    result = {"out": out, "encoder": encoder, "count": found.count, "width": found.dim}
    emit(result, as_json, f"{out}: {found.count} images, {found.dim} features of {encoder}")


@main.command()
@click.argument("a", type=click.Path(exists=True))
@click.argument("b", type=click.Path(exists=True))
@click.option("--estimator", default="plugin", type=click.Choice(ESTIMATORS), help="Estimator of the distance.")
@click.option("--confidence", default=0.95, type=click.FloatRange(0, 1, True, True), help="Coverage of the interval.")
@click.option("--seeds", default=1, type=click.IntRange(1), help="Average over this many random splits.")
@_encoder_option
@_batch_option
@_size_option
@json_option
def fd(
    a: str,
    b: str,
    estimator: Estimator,
    confidence: float,
    seeds: int,
    encoder: str,
    batch: int,
    size: int | None,
    as_json: bool,
) -> None:
    """Frechet distance between A and B: folders of images, or npz files of statistics (taken as exact)."""
    left, right = (
        FeatureStats.load(p) if Path(p).suffix == ".npz" else _features(p, encoder, batch, size) for p in (a, b)
    )
    if isinstance(left, FeatureStats):
        left, right = right, left
    if isinstance(left, FeatureStats) and isinstance(right, FeatureStats):
        _between_stats(left, right, estimator, as_json)
        return
    assert isinstance(left, Tensor)
    runs = [estimate_frechet(left, right, estimator, confidence=confidence, seed=s) for s in range(seeds)]
    value = sum(r.value for r in runs) / seeds
    half = (runs[0].high - runs[0].low) / 2
    width = left.shape[1]
    fewest = min(n for n in (runs[0].count_x, runs[0].count_y) if n)
    spread = float(torch.tensor([r.value for r in runs]).std()) if seeds > 1 else 0.0
    warning = (
        f"{fewest} images for {width} features: below 4 per feature the plug-in's bias exceeds what it measures"
        if fewest < 4 * width and estimator == "plugin"
        else None
    )
    result = {
        "fd": value,
        "low": value - half,
        "high": value + half,
        "estimator": estimator,
        "confidence": confidence,
        "seed_spread": spread,
        "encoder": encoder,
        "counts": [runs[0].count_x, runs[0].count_y],
        "width": width,
        "warning": warning,
    }
    text = f"Frechet distance {value:.6g}  [{value - half:.6g}, {value + half:.6g}]  ({estimator}, {encoder})"
    emit(result, as_json, text + (f"\nwarning: {warning}" if warning else ""))


def _between_stats(left: FeatureStats, right: FeatureStats, estimator: str, as_json: bool) -> None:
    if estimator != "plugin":
        raise ValueError(f"estimator: expected plugin between two files of statistics, got {estimator}")
    value = float(frechet_distance(left, right))
    result = {"fd": value, "estimator": "plugin", "encoder": None, "counts": [left.count, right.count]}
    emit(result, as_json, f"Frechet distance {value:.6g}")
