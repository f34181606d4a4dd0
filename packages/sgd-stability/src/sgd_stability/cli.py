"""The command `sgd-stability`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from core_tensor.app import figures
from core_tensor.app.cli import (
    command_line,
    device_option,
    emit,
    json_option,
    out_option,
    quick_option,
    seed_option,
    table,
    threads_option,
)

from sgd_stability.theory.schemes import SCHEMES, Scheme

if TYPE_CHECKING:
    from core_tensor.linalg.spectrum import SymmetricOperator

    from sgd_stability.report.report import StabilityReport

LOSSES = "squared_error, mse, cross_entropy, token_cross_entropy or causal_lm."
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
PLOT = "sgd-stability[plot]"


@command_line("sgd-stability")
def main() -> None:
    """Which learning rate, which batch size, which samples? `advise` answers from a short pilot run.

    Behind it is the linear stability of SGD: `analyze` and `map` judge a trained model, `quadratic` shows the paper's
    theorems beside the exact threshold.
    """


@main.command("advise")
@click.argument("model")
@click.argument("data")
@click.option("--weights", type=click.Path(exists=True, dir_okay=False), help="Safetensors file to load.")
@click.option("--loss", default="cross_entropy", help=LOSSES)
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="adamw", help="Optimizer; momentum is 0.9.")
@click.option("--batch-size", type=click.IntRange(1), default=32, help="Samples per step.")
@click.option("--steps", type=click.IntRange(20), default=300, help="Steps of the pilot run.")
@click.option("--max-samples", type=click.IntRange(1), default=4096, help="Most samples to train on.")
@seed_option
@threads_option
@device_option
@json_option
def advise_command(
    model: str, data: str, weights: str | None, loss: str, device: str, as_json: bool, **options: Any
) -> None:
    r"""Learning rate, warmup, batch size, and the samples that cap them, from a pilot run. MODEL, DATA as in `analyze`.

    \b
    sgd-stability advise net.py:build net.py:dataset --optimizer adam
    """
    from sgd_stability.monitor.advice import advise
    from sgd_stability.report.sources import load_data, load_model

    found = advise(load_model(model, weights, device), loss, load_data(data), **options)
    emit(found.to_dict(), as_json, str(found))


@main.command()
@click.option("--n", type=click.IntRange(2, 512), default=64, help="Number of samples.")
@click.option("--coherence", type=float, default=4.0, help="Coherence sigma of the family, from 1 to n.")
@click.option("--sharpness", type=float, default=1.0, help="lambda1 of the mean Hessian.")
@click.option("--lr", type=float, default=0.8, help="Learning rate of the picture over batch size and coherence.")
@click.option("--sampling", type=click.Choice(SCHEMES), default="bernoulli", help="How minibatches are drawn.")
@seed_option
@threads_option
@out_option("Picture to write.")
@json_option
def quadratic(
    n: int, coherence: float, sharpness: float, lr: float, sampling: Scheme, seed: int, out: Path | None, as_json: bool
) -> None:
    """Exact threshold, bounds and the paper's theorems on a synthetic family."""
    from sgd_stability.report.paper_figure import family_table, plot_quadratic

    if out is not None:
        figures.check(out, PLOT)
    rows = family_table(n, coherence, sharpness, sampling, seed)
    result: dict[str, Any] = {
        "n": n,
        "coherence": coherence,
        "sharpness": sharpness,
        "sampling": sampling,
        "thresholds": rows,
    }
    if out is not None:
        plot_quadratic(out, n=n, sigma=coherence, lambda1=sharpness, lr=lr, scheme=sampling, seed=seed)
        result["picture"] = str(out)
    emit(result, as_json, lambda: table(rows) + (f"\npicture: {out}" if out else ""))


def _model_options(function: Any) -> Any:
    """What the commands about a model have in common."""
    options = [
        click.argument("model"),
        click.argument("data"),
        click.option("--weights", type=click.Path(exists=True, dir_okay=False), help="Safetensors file to load."),
        click.option("--loss", default="cross_entropy", help=LOSSES),
        click.option("--curvature", type=click.Choice(["ggn", "hessian"]), default="ggn", help="Which curvature."),
        click.option(
            "--method",
            type=click.Choice(["auto", "gram", "jacobian", "truncated"]),
            default="auto",
            help="Exact by the Gram matrix or explicit Jacobians, or a band from k directions.",
        ),
        click.option(
            "--k", type=click.IntRange(1), help="Directions of the truncated method [40; fewer above 7M parameters]."
        ),
        click.option("--max-samples", type=click.IntRange(1), default=512, help="Most samples to analyze."),
        click.option("--momentum", type=float, default=0.0, help="Momentum of SGD."),
        click.option("--nesterov", is_flag=True, help="Nesterov's momentum."),
        click.option("--weight-decay", type=float, default=0.0, help="Weight decay of SGD."),
        click.option("--double/--single", default=True, help="Precision of the model during the analysis."),
        click.option(
            "--sampling", type=click.Choice(SCHEMES), default="without_replacement", help="How minibatches are drawn."
        ),
        seed_option,
        threads_option,
        device_option,
        json_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


@main.command("analyze")
@_model_options
@click.option("--lr", type=float, help="Learning rate to judge.")
@click.option("--batch-size", type=click.IntRange(1), help="Batch size to judge.")
@out_option("Folder for the pictures of map, coherence, curvatures and density.", folder=True)
def analyze_command(lr: float | None, batch_size: int | None, out: Path | None, as_json: bool, **options: Any) -> None:
    r"""Stability of a model on data.

    MODEL is package.module:function or file.py:function, a function without arguments that returns the nn.Module (the
    current folder is importable). DATA is an npz file with arrays x (inputs) and y (targets), or such a function that
    returns a dataset, a loader, or (inputs, targets).

    \b
    sgd-stability analyze net.py:build data.npz --weights net.safetensors --lr 0.1 --batch-size 32
    """
    from sgd_stability.report.pictures import draw_report
    from sgd_stability.report.report import finite
    from sgd_stability.spectra import spectral_density
    from sgd_stability.theory.sampling import powers_of_two

    _check_both(lr, batch_size)
    if out is not None:
        figures.check(out / "map.png", PLOT)
    report, source = _analyze(**options)
    result = report.to_dict(powers_of_two(report.n))
    lines = [str(report), table({"B": int(B), **t} for B, t in result["thresholds"].items())]
    if lr is not None and batch_size is not None:
        verdict = report.verdict(lr, batch_size)
        safest = report.min_batch_size(lr) if report.family.signs is None else None
        result["verdict"] = {**vars(verdict), "margin": finite(verdict.margin), "min_batch_size": safest}
        lines.append(
            f"lr {lr:g} at batch size {batch_size}: {verdict.state} (lr / threshold = {verdict.margin:.3g}, by "
            f"{verdict.certificate}); smallest stable batch size {safest or '-'}"
        )
    if out is not None:
        drawn = draw_report(report, out, spectral_density(source(), probes=2, steps=60))
        result["pictures"] = [str(path) for path in drawn]
        lines.append("pictures: " + ", ".join(result["pictures"]))
    emit(result, as_json, "\n".join(lines))


@main.command("map")
@_model_options
@out_option("Picture to write.", default="map.png")
def map_command(out: Path, as_json: bool, **options: Any) -> None:
    """Draw the map of stability over batch size and learning rate. MODEL and DATA as in `analyze`."""
    from sgd_stability.report.report import finite

    figures.check(out, PLOT)
    report, _ = _analyze(**options)
    found = report.stability_map()
    found.plot(out)
    result = {
        "picture": str(out),
        "batch_sizes": found.batch_sizes.tolist(),
        "lrs": found.lrs.tolist(),
        "stable": found.stable.tolist(),
        "curves": {name: [finite(v) for v in values] for name, values in found.curves.items()},
    }
    emit(result, as_json, f"{report}\npicture: {out}")


@main.command()
@out_option("Picture to write.", default="sgd-stability-demo.png")
@seed_option
@threads_option
@quick_option
@json_option
def demo(out: Path, seed: int, quick: bool, as_json: bool) -> None:
    """Train a net on digits to a minimum, predict the largest stable learning rates, and verify them by running SGD."""
    from sgd_stability.demo import EXTRA, run_demo

    figures.check(out, EXTRA)
    result = run_demo(out, seed=seed, n=24 if quick else 48, batch_sizes=(1, 4) if quick else (1, 4, 16))
    emit(
        result,
        as_json,
        lambda: (
            f"{result['summary']}\n{table(result['thresholds'])}\n"
            f"{result['correct']} of {result['runs']} runs of SGD at 0.8 and 1.2 times the prediction behaved as "
            f"predicted\npicture: {out}"
        ),
    )


def _check_both(lr: float | None, batch_size: int | None) -> None:
    if (lr is None) != (batch_size is None):
        raise ValueError("--lr: expected together with --batch-size, got one of them")


def _analyze(
    model: str,
    data: str,
    weights: str | None,
    loss: str,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    double: bool,
    device: str,
    **options: Any,
) -> tuple["StabilityReport", Callable[[], "SymmetricOperator"]]:
    """The report, and the curvature it is about as an operator."""
    from sgd_stability.report.analysis import analyze
    from sgd_stability.report.sources import load_data, load_model
    from sgd_stability.spectra import gauss_newton_operator, loss_hessian_operator, network_of
    from sgd_stability.theory.dynamics import Update

    network, samples = load_model(model, weights, device), load_data(data)
    if double:
        network = network.double()
    update = Update(momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    report = analyze(network, loss, samples, update=update, **options)

    def operator() -> "SymmetricOperator":
        build = gauss_newton_operator if options["curvature"] == "ggn" else loss_hessian_operator
        most, seed = options["max_samples"], options["seed"]
        return build(network_of(network, loss, samples, max_samples=most, seed=seed))

    return report, operator
