"""`quantease eval`, `quantease compare` and `quantease inspect`."""

from pathlib import Path
from typing import Any

import click
from core_tensor.app.cli import device_option, emit, json_option, overwrite_option, table, threads_option

from quantease.cli.options import (
    MODEL_HELP,
    average_bits,
    layer_config,
    layer_options,
    open_model,
    quiet,
    run_folder,
    stages,
    text_options,
    text_split,
    tokenizer_of,
    trust_option,
)


@click.command(name="eval")
@click.argument("model")
@click.option("--text", multiple=True, help="Files as for `quantize`; without any: the Python reference of pydoc.")
@click.option("--column", default="text", help="Column of the text in Parquet, JSON Lines and datasets.")
@click.option("--length", type=click.IntRange(2), default=512, help="Tokens per window.")
@click.option("--stride", type=click.IntRange(1), help="Tokens by which the window moves.  [default: the length]")
@click.option("--tokens", type=click.IntRange(2), default=20480, help="Tokens to evaluate at most.")
@click.option(
    "--bos",
    type=click.Choice(["auto", "yes", "no"]),
    default="auto",
    help="Beginning-of-text token in each window.",
)
@click.option("--against", help="Full-precision model: also MODEL's mean KL divergence from it.")
@click.option("--tasks", help="Zero-shot tasks for lm-eval (pip install lm-eval), with commas between.")
@click.option(
    "--tasks-folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with task files (YAML) of your own for lm-eval, which can read local data.",
)
@click.option("--limit", type=click.IntRange(1), help="Documents per task at most.  [default: all]")
@device_option
@threads_option
@trust_option
@json_option
def evaluate(model: str, as_json: bool, **options: Any) -> None:
    """Perplexity of MODEL (quantized or not) on text, its divergence from another, and accuracy on zero-shot tasks."""
    from quantease.evaluation.evaluate import load_for_evaluation, zero_shot
    from quantease.evaluation.perplexity import divergence, perplexity
    from quantease.evaluation.text import first_token, python_topics, read_text

    quiet()
    trust, length = options["trust_remote_code"], options["length"]
    loaded, tokenizer = load_for_evaluation(model, trust_remote_code=trust)
    loaded = loaded.to(options["device"])
    text, column = options["text"], options["column"]
    content = read_text(text, column, tokenizer=tokenizer) if text else python_topics().evaluation
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][: options["tokens"]]
    stride = options["stride"] or length
    result: dict[str, Any] = {"model": model, "tokens": len(ids), "length": length, "stride": stride}
    settings: dict[str, Any] = {"length": length, "first": first_token(tokenizer, options["bos"])}
    with stages() as stage:
        result["perplexity"] = perplexity(
            loaded, ids, stride=stride, progress=lambda done, total: stage("perplexity", done, total), **settings
        )
        if options["against"]:
            exact = load_for_evaluation(options["against"], tokenizer=False, trust_remote_code=trust)[0]
            kl, error = divergence(
                loaded,
                exact.to(options["device"]),
                ids,
                progress=lambda done, total: stage("divergence", done, total),
                **settings,
            )
            result |= {"kl": kl, "kl_standard_error": error}
    if options["tasks"]:
        tasks, folder = options["tasks"].split(","), options["tasks_folder"]
        result["tasks"] = zero_shot(loaded, tokenizer, tasks, folder=folder, limit=options["limit"])
    figures = {f"{t}: {name}": v for t, found in result.get("tasks", {}).items() for name, v in found.items()}
    shown = {key: value for key, value in result.items() if key != "tasks"} | figures
    emit(result, as_json, lambda: table([{"": key, "value": value} for key, value in shown.items()]))


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@layer_options
@text_options
@click.option("--evaluation", type=click.IntRange(1), default=40, help="Windows on which the methods are measured.")
@click.option("--blocks", type=click.IntRange(1), help="Quantize only the first blocks.  [default: all]")
@overwrite_option
@json_option
def compare(
    model: str, out: Path, evaluation: int, blocks: int | None, overwrite: bool, as_json: bool, **options: Any
) -> None:
    """Quantize MODEL by rounding, GPTQ and QuantEase on the same tokens: one table and one picture in OUT."""
    from core_tensor.app.figures import check

    from quantease.evaluation.compare import compare_methods, default_methods
    from quantease.evaluation.text import windows
    from quantease.model.plan import ModelConfig

    check(out / "layer_errors.png", "quantease[plot]")
    lm = open_model(model, options)
    tokenizer = tokenizer_of(lm)
    text = text_split(options, tokenizer)
    calibration = windows(tokenizer, text.calibration, options["length"], options["windows"], bos=options["bos"])
    other = windows(tokenizer, text.evaluation, options["length"], evaluation, bos=options["bos"])
    methods = default_methods(layer_config(lm, options, "quantease"))
    with stages() as stage:
        compared = compare_methods(
            lm,
            calibration,
            other,
            out,
            methods,
            ModelConfig(average_bits=average_bits(options)),
            blocks=blocks,
            overwrite=overwrite,
            stage=stage,
        )
    compared.draw(out / "layer_errors.png", f"{lm.name}, {options['bits']} bits")
    emit(
        {"model": lm.name, "text_sha256": text.digest, "rows": compared.rows, "picture": str(out / "layer_errors.png")},
        as_json,
        lambda: f"{table(compared.rows)}\n\nlayer errors: {out / 'layer_errors.png'}",
    )


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
def inspect(run: Path, as_json: bool) -> None:
    """Show bits per weight and layer errors of RUN (the OUT of `quantize`)."""
    from quantease.evaluation.report import READING, read_report

    report = read_report(run_folder(run, "report.json") / "report.json")
    keys = (
        "block",
        "matrix",
        "out",
        "in",
        "algorithm",
        "bits_per_weight",
        "calibration_error",
        "heldout_error",
        "target_factor",
    )

    def render() -> str:
        totals = [{"": k, "value": v} for k, v in report["summary"].items() if not isinstance(v, dict | list)]
        layers = table([{key: row.get(key) for key in keys} for row in report["layers"]])
        return f"{layers}\n\n{table(totals)}\n\n{READING}"

    emit(report, as_json, render)
