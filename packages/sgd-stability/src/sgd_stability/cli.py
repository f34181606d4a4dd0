"""The command `sgd-stability`."""

import importlib
import sys
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from core_tensor.cli import command_line, emit, json_option, table

from sgd_stability.analysis import analyze
from sgd_stability.dynamics import Update
from sgd_stability.report import StabilityReport, finite
from sgd_stability.sampling import SCHEMES, Scheme

sampling_option = click.option(
    "--sampling", type=click.Choice(SCHEMES), default="without_replacement", help="How minibatches are drawn."
)


@command_line("sgd-stability")
def main() -> None:
    """Linear stability of SGD from the geometry of the loss: exact thresholds, coherence, a live monitor."""


@main.command()
@click.option("--n", type=click.IntRange(2, 512), default=64, help="Number of samples.")
@click.option("--coherence", type=float, default=4.0, help="Coherence sigma of the family, from 1 to n.")
@click.option("--sharpness", type=float, default=1.0, help="lambda1 of the mean Hessian.")
@click.option("--lr", type=float, default=0.8, help="Learning rate of the picture over batch size and coherence.")
@click.option("--sampling", type=click.Choice(SCHEMES), default="bernoulli", help="How minibatches are drawn.")
@click.option("--seed", type=int, default=0, help="Seed of the directions.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture to write.")
@json_option
def quadratic(
    n: int, coherence: float, sharpness: float, lr: float, sampling: Scheme, seed: int, plot: Path | None, as_json: bool
) -> None:
    """Exact threshold, bounds and the paper's theorems on a synthetic family."""
    from sgd_stability.paper_figure import family_table, plot_quadratic

    rows = family_table(n, coherence, sharpness, sampling, seed)
    result: dict[str, Any] = {
        "n": n,
        "coherence": coherence,
        "sharpness": sharpness,
        "sampling": sampling,
        "thresholds": rows,
    }
    if plot is not None:
        plot_quadratic(plot, n=n, sigma=coherence, lambda1=sharpness, lr=lr, scheme=sampling, seed=seed)
        result["picture"] = str(plot)
    emit(result, as_json, lambda: table(rows) + (f"\npicture: {plot}" if plot else ""))


def _model_options(function: Any) -> Any:
    options = [
        click.argument("model"),
        click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
        click.option("--weights", type=click.Path(exists=True, dir_okay=False), help="Safetensors file to load."),
        click.option("--loss", default="cross_entropy", help="squared_error, mse or cross_entropy."),
        click.option("--curvature", type=click.Choice(["ggn", "hessian"]), default="ggn", help="Which curvature."),
        click.option("--max-samples", type=click.IntRange(1), default=512, help="Most samples to analyse."),
        click.option("--momentum", type=float, default=0.0, help="Momentum of SGD."),
        click.option("--weight-decay", type=float, default=0.0, help="Weight decay of SGD."),
        click.option("--double/--single", default=True, help="Precision of the model during the analysis."),
        click.option("--seed", type=int, default=0, help="Seed of the subsample."),
        sampling_option,
        json_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


@main.command("analyze")
@_model_options
@click.option("--lr", type=float, help="Learning rate to judge.")
@click.option("--batch-size", type=click.IntRange(1), help="Batch size to judge.")
def analyze_command(lr: float | None, batch_size: int | None, as_json: bool, **options: Any) -> None:
    """Stability of a model on data.

    MODEL is package.module:function, a function without arguments that returns the nn.Module (the current folder is
    importable). DATA is an npz file with arrays x (inputs) and y (targets).
    """
    report = _analyze(**options)
    result = report.to_dict([B for B in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if report.n >= B])
    lines = [str(report), table({"B": int(B), **t} for B, t in result["thresholds"].items())]
    if lr is not None and batch_size is not None:
        verdict = report.verdict(lr, batch_size)
        safest = report.min_batch_size(lr) if report.family.signs is None else None
        result["verdict"] = {**vars(verdict), "margin": finite(verdict.margin), "min_batch_size": safest}
        lines.append(
            f"lr {lr:g} at batch size {batch_size}: {verdict.state} (lr / threshold = {verdict.margin:.3g}, by "
            f"{verdict.certificate}); smallest stable batch size {safest}"
        )
    emit(result, as_json, "\n".join(lines))


@main.command("map")
@_model_options
@click.option("--plot", type=click.Path(path_type=Path), default=Path("map.png"), help="Picture to write.")
def map_command(plot: Path, as_json: bool, **options: Any) -> None:
    """Draw the map of stability over batch size and learning rate. MODEL and DATA as in `analyze`."""
    report = _analyze(**options)
    found = default_map(report)
    found.plot(plot)
    result = {
        "picture": str(plot),
        "batch_sizes": found.batch_sizes.tolist(),
        "lrs": found.lrs.tolist(),
        "stable": found.stable.tolist(),
        "curves": {name: [finite(v) for v in values] for name, values in found.curves.items()},
    }
    emit(result, as_json, f"{report}\npicture: {plot}")


@main.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("sgd-stability-demo.png"), help="Picture.")
@click.option("--seed", type=int, default=0, help="Seed.")
@json_option
def demo(output: Path, seed: int, as_json: bool) -> None:
    """Train a net on digits to a minimum, predict the largest stable learning rates, and verify them by running SGD."""
    from sgd_stability.demo import run_demo

    result = run_demo(output, seed=seed)
    emit(
        result,
        as_json,
        lambda: (
            f"{result['summary']}\n{table(result['thresholds'])}\n"
            f"{result['correct']} of {result['runs']} runs of SGD at 0.8 and 1.2 times the prediction behaved as "
            f"predicted\npicture: {output}"
        ),
    )


def default_map(report: StabilityReport, rows: int = 28) -> Any:
    """The map over powers of two and learning rates around the thresholds.

    Args:
        report: The report.
        rows: Learning rates.

    Returns:
        The map.
    """
    batch_sizes = [2**i for i in range(20) if 2**i <= report.n]
    rates = [float(report.lr_threshold(B)) for B in batch_sizes]
    lrs = np.geomspace(min(rates) / 3, max(rates) * 2, rows).tolist()
    return report.stability_map(lrs, batch_sizes)


def _analyze(
    model: str,
    data: Path,
    weights: str | None,
    loss: str,
    curvature: str,
    max_samples: int,
    momentum: float,
    weight_decay: float,
    double: bool,
    seed: int,
    sampling: Scheme,
) -> StabilityReport:
    network = _load_model(model)
    if weights is not None:
        from core_tensor.extras import require

        network.load_state_dict(require("safetensors.torch", "sgd-stability[files]").load_file(weights))
    network.eval()
    x, y = _load_data(data)
    if double:
        network, x = network.double(), x.double() if x.is_floating_point() else x
        y = y.double() if y.is_floating_point() else y
    return analyze(
        network,
        loss,
        (x, y),
        curvature=cast("Any", curvature),
        sampling=sampling,
        update=Update(momentum=momentum, weight_decay=weight_decay),
        max_samples=max_samples,
        seed=seed,
    )


def _load_model(target: str) -> torch.nn.Module:
    module, colon, name = target.partition(":")
    if not colon:
        raise ValueError(f"MODEL: expected package.module:function, got {target!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"MODEL: {error}") from error
    finally:
        sys.path.pop(0)
    built = found()
    if not isinstance(built, torch.nn.Module):
        raise ValueError(f"MODEL: expected {target} to return an nn.Module, got {type(built).__name__}")
    return built


def _load_data(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"DATA: expected an npz file with arrays x and y, {path}: {error}") from error
    return torch.from_numpy(x), torch.from_numpy(y)
