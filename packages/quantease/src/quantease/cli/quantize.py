"""`quantease quantize` and `quantease export`."""

from pathlib import Path
from typing import Any

import click
from core_tensor.app.cli import emit, json_option, overwrite_option, table
from core_tensor.app.ranks import join

from quantease.choices import ALGORITHMS, DEFAULT_SKIP
from quantease.cli.options import (
    MODEL_HELP,
    Stage,
    average_bits,
    format_option,
    layer_config,
    layer_options,
    open_model,
    run_folder,
    show,
    stages,
    text_options,
    tokenizer_of,
    trust_option,
)


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--algorithm", type=click.Choice(ALGORITHMS), default="quantease", help="How layers are quantized.")
@layer_options
@click.option("--grid", type=click.Choice(["auto", "minmax", "clip"]), default="auto", help="Ends of the grids.")
@click.option(
    "--shrinkage", default="auto", help="Of the Gram matrices: auto, heldout, none, or a strength between 0 and 1."
)
@click.option("--damping", type=float, default=0.01, help="GPTQ's addition to the diagonal, over its mean.")
@click.option("--folds", type=click.IntRange(1), default=2, help="Parts of the tokens, one of which is held out.")
@click.option(
    "--target",
    type=click.Choice(["auto", "full-precision", "own"]),
    default="auto",
    help="Outputs that layers are to match: the full-precision model's, or those of their own weights.",
)
@click.option(
    "--tune",
    type=click.Choice(["auto", "none", "block", "model"]),
    default="auto",
    help="Tune scales and norms once codes are fixed: block by block, and for `model` then all together against the "
    "whole model's predictions, which holds it in memory.  [auto: block up to 3 bits]",
)
@click.option(
    "--skip",
    multiple=True,
    help="Regular expression: matrices whose names it finds stay as they are.  [default: routers]",
)
@click.option("--lm-head", is_flag=True, help="Quantize the output head, too (and embeddings that it shares).")
@click.option("--embeddings", is_flag=True, help="Quantize the token embeddings, too (and a head that shares them).")
@click.option(
    "--order", type=click.Choice(["layer", "block"]), default="layer", help="Passes per group of layers or per block."
)
@click.option(
    "--outlier-budget",
    type=click.Choice(["layer", "model"]),
    default="layer",
    help="Whether --outliers is a fraction of every layer or of the model, shared by what it saves each layer.",
)
@text_options
@click.option(
    "--evaluation",
    type=click.IntRange(0),
    default=4,
    help="Further windows, on which OUT is compared with MODEL.",
)
@format_option
@overwrite_option
@json_option
def quantize(
    model: str, out: Path, as_json: bool, format_: str | None, overwrite: bool, skip: tuple[str, ...], **options: Any
) -> None:
    """Quantize MODEL and write it to OUT; the same command continues after a kill.

    Before any layer is touched, a few random blocks are quantized by rounding, saved in the format and loaded again.
    Under `torchrun --nproc-per-node N -m quantease quantize ...` the ranks share the calibration windows and the
    layers of a block; OUT must be on storage that all of them see.
    """
    from quantease.evaluation.report import write_report
    from quantease.export.rehearsal import rehearse
    from quantease.export.save import check_destination, check_format, export_model
    from quantease.model.plan import ModelConfig, check_coverage, model_matrices
    from quantease.model.quantize_model import quantize_model

    mixed = average_bits(options) is not None and not options["symmetric"]
    format_ = format_ or ("native" if options["outliers"] or mixed else "compressed-tensors")
    with join(options["device"]) as ranks, stages(ranks.first) as stage:
        # 1. what would fail at the end fails now
        check_destination(out)
        lm = open_model(model, options)
        check_destination(out, lm.source)
        config = ModelConfig(
            layer_config(lm, options, options["algorithm"]),
            average_bits=average_bits(options),
            order=options["order"],
            target=options["target"],
            tune=options["tune"],
            skip=skip or DEFAULT_SKIP,
            lm_head=options["lm_head"],
            embeddings=options["embeddings"],
            folds=options["folds"],
            outlier_budget=options["outlier_budget"],
        )
        check_format(lm, config, format_)
        if not skip:
            check_coverage(lm, model_matrices(lm, config))
        tokens, evaluation = _tokens(lm, model, options, stage)
        stage("rehearsal", 0, 1)
        rehearse(lm, config, format_, out)
        stage("rehearsal", 1, 1)

        # 2. the work
        def progress(done: int, total: int, _: str) -> None:
            stage("layers", done, total)

        run = quantize_model(lm, tokens, out / "quantease", config, overwrite=overwrite, progress=progress)
        if ranks.first:
            stage(f"saving as {format_}", 0, 1)
            export = export_model(run, out, format_)
            stage(f"saving as {format_}", 1, 1)
            report = write_report(run, out / "quantease", {"export": export.to_dict()}, evaluation, stage)
        ranks.barrier()  # nobody leaves while the first rank saves
        if not ranks.first:
            return
    bits = 8 * export.bytes / max(1, report["weights_of_the_model"])
    head = (
        f"{100 * report['quantized_fraction']:.1f} % of the block weights quantized, "
        f"file = {bits:.2f} bits per weight of the whole model"
    )
    shown = {k: v for k, v in report.items() if not isinstance(v, dict)} | {
        f"{export.format}, bytes": export.bytes,
        "reloaded: difference of logits over the greatest": export.logit_difference,
    }
    rows = [{"": k.replace("_", " "), "value": show(v)} for k, v in shown.items()]
    emit(report, as_json, lambda: f"{head}\n\n{table(rows)}")


def _tokens(lm: Any, model: str, options: dict[str, Any], stage: Stage) -> tuple[Any, Any]:
    """Calibration windows and, disjoint from them, evaluation windows (None without)."""
    from quantease.evaluation.text import python_topics, read_text, sample_windows, windows

    count, length, evaluation = options["windows"], options["length"], options["evaluation"]
    if options["text"] == ("self",):
        from quantease.evaluation.evaluate import load_for_evaluation
        from quantease.evaluation.samples import own_samples

        complete = load_for_evaluation(model, tokenizer=False, trust_remote_code=options["trust_remote_code"])[0]

        def progress(done: int, total: int) -> None:
            stage("sampling", done, total)

        samples = own_samples(
            complete.to(options["device"]), count + evaluation, length, seed=options["seed"], progress=progress
        )
        return samples[:count], samples[count:] if evaluation else None
    tokenizer, chosen = tokenizer_of(lm), {"bos": options["bos"], "seed": options["seed"]}
    if not options["text"]:
        topics = python_topics()
        other = windows(tokenizer, topics.evaluation, length, evaluation, bos=options["bos"]) if evaluation else None
        return sample_windows(tokenizer, topics.calibration, length, count, **chosen)[0], other
    limit = 48 * length * (count + evaluation)  # characters, of data sets that are streamed
    text = read_text(options["text"], options["column"], tokenizer=tokenizer, stream_limit=limit)
    return sample_windows(tokenizer, text, length, count, evaluation, **chosen)


@click.command(name="export", epilog=MODEL_HELP)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", required=True, help="The model that was quantized (norms and embeddings come from it).")
@format_option
@trust_option
@json_option
def export_command(
    run: Path, out: Path, model: str, format_: str | None, trust_remote_code: bool, as_json: bool
) -> None:
    """Save the quantized model of RUN (the OUT of `quantize`) to OUT in another format."""
    from quantease.export.save import check_destination, export_model
    from quantease.model.quantize_model import open_quantized, run_dtype

    folder = run_folder(run, "run.json")
    check_destination(out)
    options = {"dtype": run_dtype(folder), "trust_remote_code": trust_remote_code}
    quantized = open_quantized(open_model(model, options), folder)
    layer = quantized.config.layer
    mixed = quantized.config.average_bits is not None and not layer.symmetric
    format_ = format_ or ("native" if layer.outliers or mixed else "compressed-tensors")
    report = export_model(quantized, out, format_).to_dict()
    emit(report, as_json, lambda: table([{"": key, "value": show(value)} for key, value in report.items()]))
