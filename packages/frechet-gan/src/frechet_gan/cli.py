"""The command `frechet-gan`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from core_tensor.app.cli import command_line, emit, json_option, progress, table
from torch import Tensor

from frechet_gan.demo import compare_demo, hacking_demo
from frechet_gan.encoders.frozen import encode, load_encoder
from frechet_gan.evaluation.report import Report, evaluate
from frechet_gan.frechet.distance import frechet_distance
from frechet_gan.frechet.estimators import ESTIMATORS, Estimator, estimate_frechet
from frechet_gan.frechet.stats import FeatureStats
from frechet_gan.images.data import load_data
from frechet_gan.images.files import image_batches, image_files, write_image
from frechet_gan.plots import curve_figure
from frechet_gan.training.checkpoints import load_generator
from frechet_gan.training.config import PRESETS
from frechet_gan.training.networks import KINDS, Kind, NetworkConfig
from frechet_gan.training.posttrain import PosttrainConfig, PostTrainer, encoder_losses
from frechet_gan.training.runs import heldout_encoder, posttrain_run, read_histories, summary, train_run
from frechet_gan.training.sampling import sample_images
from frechet_gan.transport.populations import EMAPopulation

_encoder_option = click.option(
    "--encoder",
    default="efficientnet-lite0",
    help="efficientnet-lite0|1|2, pixels, pixels:SIZE, mobilenet:FILE.npz, torchvision:MODEL, timm:MODEL or dinov2.",
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
    if isinstance(left, FeatureStats) and isinstance(right, FeatureStats):
        _between_stats(left, right, estimator, as_json)
        return
    if isinstance(left, FeatureStats):
        left, right = right, left
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


_heldout_option = click.option(
    "--heldout",
    default="auto",
    help="Encoder of the metric; auto: a classifier of the labels, pixels:8 without labels.",
)
_data_option = click.option(
    "--data", default="digits", help="digits, mnist:FOLDER, cifar:FILE.npz, glyphs, or a folder of images."
)


@main.command()
@_data_option
@click.option("--size", type=click.IntRange(4), help="Height and width, in pixels. [default: the data's]")
@click.option("--loss", "method", default="frechet", type=click.Choice(list(PRESETS)), help="Method.")
@click.option("--net", default="mlp", type=click.Choice(KINDS), help="Kind of networks.")
@click.option("--width", default=128, type=click.IntRange(4), help="Hidden units (mlp) or channels.")
@click.option("--features", default=32, type=click.IntRange(1), help="Width of the discriminator's feature space.")
@click.option("--latent", default=64, type=click.IntRange(1), help="Width of the latents.")
@click.option("--d-reg", type=click.Choice(["r1", "gp", "sn", "none"]), help="Regulariser. [default: the method's]")
@click.option("--steps", default=1000, type=click.IntRange(1), help="Generator steps.")
@click.option("--every", default=250, type=click.IntRange(1), help="Steps between measurements and checkpoints.")
@click.option("--batch", default=128, type=click.IntRange(2), help="Images per step and rank.")
@click.option("--g-batch", type=click.IntRange(2), help="Images per generator step. [default: the batch]")
@click.option("--lr", default=5e-4, type=click.FloatRange(0, min_open=True), help="Learning rate of both networks.")
@click.option("--ema", default=0.0, type=click.FloatRange(0, 1, max_open=True), help="Decay of averaged weights.")
@click.option("--diff-augment", is_flag=True, help="Augment what the discriminator sees (little data).")
@click.option("--bf16", is_flag=True, help="Networks in bfloat16; statistics stay in float64.")
@_heldout_option
@click.option("--seed", default=0, help="Seed of weights, data order and latents.")
@click.option("--out", "-o", required=True, type=click.Path(file_okay=False), help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint.")
@json_option
def train(
    data: str,
    size: int | None,
    method: str,
    net: Kind,
    width: int,
    features: int,
    latent: int,
    d_reg: str | None,
    steps: int,
    every: int,
    lr: float,
    heldout: str,
    out: str,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a generator; under torchrun, on every process.

    Writes a checkpoint, history.json and a grid of samples of the same latents every so many steps.
    """
    _join_ranks()
    found = load_data(data, size)
    spectral = d_reg == "sn" if d_reg else method == "hinge"
    shape = found.images.shape
    network = NetworkConfig(net, shape[-1], shape[1], latent, width, features, spectral)
    config = replace(PRESETS[method], lr_g=lr, lr_d=lr, **options)
    if d_reg:
        config = replace(config, r1=float(d_reg == "r1"), gp=10.0 * (d_reg == "gp"))
    judge = heldout_encoder(heldout, found)
    history = train_run(
        out, found, network, config, method=method, steps=steps, every=every, heldout=judge, resume=resume
    )
    last = history["points"][-1]
    result = {"out": out, "method": method, **last}
    emit(result, as_json, f"{out}: {method}, step {last['step']}, held-out Frechet distance {last['fd']:.4g}")


def _join_ranks() -> None:
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


@main.command()
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False))
@click.option("--count", default=1000, type=click.IntRange(1), help="Number of images.")
@click.option("--seed", default=0, help="Seed of the latents.")
@click.option("--out", "-o", required=True, type=click.Path(file_okay=False), help="Folder to write PNG files to.")
@json_option
def sample(checkpoint: str, count: int, seed: int, out: str, as_json: bool) -> None:
    """Write images of the generator of a CHECKPOINT, for `fd` and for other tools."""
    generator, network = load_generator(checkpoint)
    images = sample_images(generator, network.latent, count, seed)
    for i, image in enumerate(progress(images, "write", count, "image")):
        write_image(Path(out) / f"{i:06d}.png", image)
    emit({"out": out, "count": count}, as_json, f"{out}: {count} images of {network.size} x {network.size} pixels")


@main.command()
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False))
@_data_option
@click.option("--encoders", default="pixels", help="Encoders of the loss, separated by commas.")
@_heldout_option
@click.option("--beta", default=0.999, type=click.FloatRange(0, 1, max_open=True), help="Decay of the moments.")
@click.option("--steps", default=200, type=click.IntRange(1), help="Steps.")
@click.option("--every", default=100, type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--batch", default=256, type=click.IntRange(2), help="Images per step and rank.")
@click.option("--micro-batch", type=click.IntRange(2), help="Largest part held in memory. [default: the batch]")
@click.option("--lr", default=1e-4, type=click.FloatRange(0, min_open=True), help="Learning rate of AdamW.")
@click.option("--seed", default=0, help="Seed of the latents.")
@click.option("--out", "-o", required=True, type=click.Path(file_okay=False), help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint.")
@json_option
def posttrain(
    checkpoint: str,
    data: str,
    encoders: str,
    heldout: str,
    beta: float,
    steps: int,
    every: int,
    batch: int,
    micro_batch: int | None,
    lr: float,
    seed: int,
    out: str,
    resume: bool,
    as_json: bool,
) -> None:
    """Continue a CHECKPOINT by the Frechet distance on frozen encoders; report on one it never saw.

    The encoder `auto` is a classifier trained on the data's labels (another one for the loss than for the report).
    """
    _join_ranks()
    generator, network = load_generator(checkpoint)
    real = load_data(data, network.size)
    names = {name: heldout_encoder(name, real, seed=1) for name in encoders.split(",")}
    judge = {"held out": heldout_encoder(heldout, real)}
    loss = encoder_losses(names, real.images, EMAPopulation(beta))
    config = PosttrainConfig(batch=batch, micro_batch=micro_batch, lr=lr, seed=seed)
    trainer = PostTrainer(generator, network, loss, config)

    def report() -> Report:
        return evaluate(trainer.sample, real.images, names, judge)

    found = posttrain_run(out, trainer, report, steps=steps, every=every, resume=resume)
    rows = [
        {
            "encoder": b["encoder"],
            "before": b["distance"]["plugin"],
            "after": a["distance"]["plugin"],
            "ratio to real, before": b["ratio"],
            "after ": a["ratio"],
        }
        for b, a in zip(found["before"]["encoders"], found["after"]["encoders"], strict=True)
    ]
    emit({"out": out, **found}, as_json, "\n".join([table(rows), *found["after"]["alarms"]]))


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--plot", type=click.Path(dir_okay=False), help="PNG of distance against CPU time.")
@json_option
def compare(runs: tuple[str, ...], plot: str | None, as_json: bool) -> None:
    """Table of several RUNS by method: distance, spread over seeds, cost, and ratio to the ns baseline."""
    histories = read_histories(runs)
    if plot:
        curve_figure(histories, plot)
    rows = summary(histories)
    emit({"rows": rows}, as_json, table(rows))


@main.command()
@click.argument("what", default="digits", type=click.Choice(["digits", "hacking"]))
@click.option("--out", "-o", type=click.Path(dir_okay=False), help="PNG to write. [default: frechet-gan-WHAT.png]")
@click.option("--seconds", default=8.0, type=click.FloatRange(0.1), help="CPU seconds per training run (digits).")
@click.option("--seeds", default=3, type=click.IntRange(1), help="Training runs per method (digits).")
@click.option("--steps", default=600, type=click.IntRange(1), help="Generator steps (hacking).")
@json_option
def demo(what: str, out: str | None, seconds: float, seeds: int, steps: int, as_json: bool) -> None:
    """Train on scikit-learn's real digits: Frechet loss against the baseline, or an encoder being gamed."""
    torch.set_num_threads(1)  # networks this small only lose by a second thread
    out = out or f"frechet-gan-{what}.png"
    if what == "hacking":
        result = hacking_demo(out, steps)
        rows = [
            {
                "generator": n,
                "own or seen encoder": result[f"{n}_seen_fd"],
                "held-out encoder": result[f"{n}_heldout_fd"],
            }
            for n in ("gamed", "honest")
        ]
        emit(result, as_json, "\n".join([table(rows), *(f"gamed: {a}" for a in result["gamed_alarms"]), out]))
        return
    result = compare_demo(out, seconds, seeds)
    text = (
        f"held-out Frechet distance after {seconds:g} CPU seconds, mean of {seeds} seeds:\n"
        f"  Frechet loss        {result['frechet_fd']:.3f}\n"
        f"  non-saturating loss {result['ns_fd']:.3f}   (ratio {result['ratio']:.2f})\n"
        f"  real against real   {result['real_halves_fd']:.3f}\n{out}"
    )
    emit(result, as_json, text)
