"""`lirank demo` and `lirank recipe`: what needs no data of your own."""

import json
from pathlib import Path

import click
from core_tensor.app.cli import (
    emit,
    json_option,
    out_option,
    overwrite_option,
    quick_option,
    seed_option,
    table,
    threads_option,
)


@click.command()
@out_option("Folder for the log, the runs, the exported model and the picture.", folder=True, default="lirank-demo")
@quick_option
@seed_option
@threads_option
@overwrite_option
@json_option
def demo(out: Path, quick: bool, seed: int, overwrite: bool, as_json: bool) -> None:
    """A generated marketplace log with known truth: train, calibrate, compress, export and score it."""
    import shutil

    from core_tensor.app import figures
    from core_tensor.app.extras import require
    from core_tensor.app.runs import RunFolder

    for module, extra in (
        ("lightgbm", "baseline"),
        ("sklearn", "baseline"),
        ("onnx", "export"),
        ("onnxscript", "export"),
    ):
        require(module, f"lirank[{extra}]")
    require("onnxruntime", "lirank[export]")
    figures.check(out / "reliability.png", "lirank[plot]")
    from lirank.demo import run_demo

    with RunFolder.claim(out, "lirank demo", {"quick": quick, "seed": seed}, overwrite=overwrite) as run:
        if run.result is None:
            for entry in ("run", "calibrated"):  # a demo that was interrupted starts anew
                shutil.rmtree(run.path / entry, ignore_errors=True)
            run.finish(run_demo(run.path, quick=quick, seed=seed))
        found = run.result or {}
    text = (
        f"{table(found['models'])}\n\nThe table of ids is {found['int8_memory']:.2f} times smaller; the exported model "
        f"differs from the run's by at most {found['export_max_difference']:.1g}.\nDistance to the true probabilities "
        f"(RMSE): {found['distance_to_truth']['lirank']:.4f}, calibrated "
        f"{found['distance_to_truth']['calibrated']:.4f}.\nPicture: {out / 'reliability.png'}"
    )
    emit(found, as_json, text)


@click.command()
@click.argument("name", type=click.Choice(["feed", "jobs", "ads"]))
@out_option("Folder for log, schema and run.", folder=True, required=True)
@click.option("--events", type=click.IntRange(1000), default=100_000, help="Impressions of the generated log.")
@seed_option
@threads_option
@overwrite_option
@json_option
def recipe(name: str, out: Path, events: int, seed: int, overwrite: bool, as_json: bool) -> None:
    """A deployment of the paper, end to end on a generated log: NAME is feed, jobs or ads.

    The source of lirank.evidence.recipes is meant to be read and changed.
    """
    from core_tensor.app.runs import RunFolder

    from lirank.evidence.recipes import run_recipe

    with RunFolder.claim(
        out, "lirank recipe", {"name": name, "events": events, "seed": seed}, overwrite=overwrite
    ) as run:
        if run.result is None:
            run.finish(run_recipe(name, run.path, events=events, seed=seed))
        found = run.result or {}
    emit(found, as_json, lambda: json.dumps(found, indent=2))
