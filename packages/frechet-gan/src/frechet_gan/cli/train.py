"""Commands that train: `train`, `sample`, `posttrain`, `compare`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from core_tensor.app import ranks
from core_tensor.app.cli import (
    device_option,
    emit,
    json_option,
    out_option,
    overwrite_option,
    progress,
    seed_option,
    table,
    threads_option,
)
from core_tensor.app.runs import RunFolder

from frechet_gan.choices import KINDS, METHODS, Kind

_heldout_option = click.option(
    "--heldout",
    default="auto",
    help="Encoder of the metric; auto: a classifier of the labels, pixels:8 without labels.",
)
_data_option = click.option(
    "--data",
    default="digits",
    help="digits, mnist:FOLDER, cifar:FILE.npz, glyphs, or images: a folder, zip or npz file.",
)
_checkpoint = click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
_run_option = out_option("Folder of the run; the same command continues it.", folder=True, required=True)
_resume_option = click.option("--resume", is_flag=True, hidden=True, expose_value=False, help="Is always on.")


@click.command()
@_data_option
@click.option("--size", type=click.IntRange(4), help="Height and width, in pixels. [default: the data's]")
@click.option("--loss", "method", default="frechet", type=click.Choice(METHODS), help="Method.")
@click.option("--net", default="mlp", type=click.Choice(KINDS), help="Kind of networks.")
@click.option("--width", default=128, type=click.IntRange(4), help="Hidden units (mlp) or channels.")
@click.option("--features", default=32, type=click.IntRange(1), help="Width of the discriminator's feature space.")
@click.option("--latent", default=64, type=click.IntRange(1), help="Width of the latents.")
@click.option("--d-reg", type=click.Choice(["r1", "gp", "sn", "none"]), help="Regularizer. [default: the method's]")
@click.option("--steps", default=1000, type=click.IntRange(1), help="Generator steps; more of them continue a run.")
@click.option("--every", default=250, type=click.IntRange(1), help="Steps between measurements and checkpoints.")
@click.option("--batch", default=128, type=click.IntRange(2), help="Images per step and rank.")
@click.option("--g-batch", type=click.IntRange(2), help="Images per generator step. [default: the batch]")
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    help="Learning rate of both networks. [default: the method's]",
)
@click.option(
    "--layers",
    type=click.IntRange(0),
    help="Random projections of every layer that a transport loss compares; 0: the feature layer alone. "
    "[default: the method's]",
)
@click.option(
    "--ema",
    type=click.FloatRange(0, 1, max_open=True),
    help="Decay of averaged weights; 0 for none. [default: the method's]",
)
@click.option("--diff-augment", is_flag=True, help="Augment what the discriminator sees (little data).")
@click.option("--bf16", is_flag=True, help="Networks in bfloat16; statistics stay in float64.")
@_heldout_option
@seed_option
@device_option
@threads_option
@_run_option
@_resume_option
@overwrite_option
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
    lr: float | None,
    layers: int | None,
    ema: float | None,
    heldout: str,
    device: str,
    out: Path,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a generator; under torchrun, on every process.

    Writes a checkpoint, history.json and a grid of samples of the same latents every so many steps.
    """
    from frechet_gan.images.data import load_data
    from frechet_gan.training.config import PRESETS
    from frechet_gan.training.networks import NetworkConfig
    from frechet_gan.training.runs import data_digest, heldout_encoder, train_run

    # 1. everything that can be refused, before anything is written
    found = load_data(data, size)
    spectral = d_reg == "sn" if d_reg else method == "hinge"
    shape = found.images.shape
    network = NetworkConfig(net, shape[-1], shape[1], latent, width, features, spectral)
    given: dict[str, Any] = {"lr_g": lr, "lr_d": lr, "layers": layers, "ema": ema}
    config = replace(PRESETS[method], **options, **{k: v for k, v in given.items() if v is not None})
    if d_reg:
        config = replace(config, r1=float(d_reg == "r1"), gp=10.0 * (d_reg == "gp"))
    # 2. the run
    with ranks.join(device) as world:
        inputs = {
            "data": {"name": data, "digest": data_digest(found)},
            "network": network,
            "config": config,
            "method": method,
            "every": every,
            "heldout": heldout,
            "processes": world.size,
        }
        with RunFolder.claim(out, "frechet-gan train", inputs, overwrite=overwrite, ranks=world) as run:
            last = run.result
            if last is None or last["step"] < steps:
                judge = heldout_encoder(heldout, found, device=device)
                history = train_run(
                    run, found, network, config, method=method, steps=steps, every=every, heldout=judge, device=device
                )
                last = history["points"][-1]
    result = {"out": str(out), "method": method, **last}
    emit(result, as_json, f"{out}: {method}, step {last['step']}, held-out Frechet distance {last['fd']:.4g}")


@click.command()
@_checkpoint
@click.option("--count", default=1000, type=click.IntRange(1), help="Number of images.")
@seed_option
@device_option
@threads_option
@out_option("Folder to write PNG files to.", folder=True, required=True)
@json_option
def sample(checkpoint: Path, count: int, seed: int, device: str, out: Path, as_json: bool) -> None:
    """Write images of the generator of a CHECKPOINT, for `fd` and for other tools."""
    from frechet_gan.images.files import write_image
    from frechet_gan.training.checkpoints import load_generator
    from frechet_gan.training.sampling import sample_batches

    generator, network = load_generator(checkpoint)
    images = (i for part in sample_batches(generator.to(device), network.latent, count, seed) for i in part)
    for i, image in enumerate(progress(images, "write", count, "image")):
        write_image(out / f"{i:06d}.png", image)
    result = {"out": str(out), "count": count}
    emit(result, as_json, f"{out}: {count} images of {network.size} x {network.size} pixels")


@click.command()
@_checkpoint
@_data_option
@click.option("--encoders", default="pixels", help="Encoders of the loss, separated by commas.")
@_heldout_option
@click.option("--beta", default=0.999, type=click.FloatRange(0, 1, max_open=True), help="Decay of the moments.")
@click.option("--steps", default=200, type=click.IntRange(1), help="Steps.")
@click.option("--every", default=100, type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--batch", default=256, type=click.IntRange(2), help="Images per step and rank.")
@click.option("--micro-batch", type=click.IntRange(2), help="Largest part held in memory. [default: the batch]")
@click.option("--lr", default=1e-4, type=click.FloatRange(0, min_open=True), help="Learning rate of AdamW.")
@seed_option
@device_option
@threads_option
@_run_option
@_resume_option
@overwrite_option
@json_option
def posttrain(
    checkpoint: Path,
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
    device: str,
    out: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Continue a CHECKPOINT by the Frechet distance on frozen encoders; report on one it never saw.

    The encoder `auto` is a classifier trained on the data's labels (another one for the loss than for the report).
    """
    from core_tensor.app.files import sha256

    from frechet_gan.evaluation.report import Report, evaluate
    from frechet_gan.images.arrays import unit
    from frechet_gan.images.data import load_data
    from frechet_gan.training.checkpoints import load_generator
    from frechet_gan.training.posttrain import PosttrainConfig, PostTrainer, encoder_losses
    from frechet_gan.training.runs import data_digest, heldout_encoder, posttrain_run
    from frechet_gan.transport.populations import EMAPopulation

    generator, network = load_generator(checkpoint)
    real = load_data(data, network.size)
    config = PosttrainConfig(batch=batch, micro_batch=micro_batch, lr=lr, seed=seed)
    with ranks.join(device) as world:
        inputs = {
            "checkpoint": sha256(checkpoint),
            "data": {"name": data, "digest": data_digest(real)},
            "encoders": encoders,
            "heldout": heldout,
            "beta": beta,
            "config": config,
            "steps": steps,
            "every": every,
            "processes": world.size,
        }
        with RunFolder.claim(out, "frechet-gan posttrain", inputs, overwrite=overwrite, ranks=world) as run:
            found = run.result
            if found is None:
                names = {name: heldout_encoder(name, real, seed=1, device=device) for name in encoders.split(",")}
                judge = {"held out": heldout_encoder(heldout, real, device=device)}
                images = unit(real.images).to(device)
                loss = encoder_losses(names, images, EMAPopulation(beta))
                trainer = PostTrainer(generator.to(device), network, loss, config)

                def report() -> Report:
                    return evaluate(lambda n, s: trainer.sample(n, s).to(device), images, names, judge)

                found = posttrain_run(run, trainer, report, steps=steps, every=every)
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
    emit({"out": str(out), **found}, as_json, "\n".join([table(rows), *found["after"]["alarms"]]))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Picture of the curves to write.")
@json_option
def compare(runs: tuple[str, ...], plot: Path | None, as_json: bool) -> None:
    """Table of several RUNS by method: distance, spread over seeds, cost, and ratio to the ns baseline."""
    from core_tensor.app import figures

    from frechet_gan.plots import EXTRA, curve_figure
    from frechet_gan.training.runs import read_histories, summary

    if plot:
        figures.check(plot, EXTRA)
    histories = read_histories(runs)
    if plot:
        curve_figure(histories, plot)
    rows = summary(histories)
    emit({"rows": rows}, as_json, table(rows))
