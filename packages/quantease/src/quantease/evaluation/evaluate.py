"""Models as users load them, for evaluation: perplexity by `quantease.perplexity`, zero-shot tasks by lm-eval."""

import importlib.util
import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from core_tensor.app.extras import require
from core_tensor.app.files import read_json, reading

from quantease.evaluation.smollm2 import smollm2_path
from quantease.export import gptq
from quantease.model.causal_lm import auto_class, check_place, foreign, open_gguf


def load_for_evaluation(model: str, *, tokenizer: bool = True, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a model, quantized in any of our formats or not, and its tokenizer.

    transformers does it, but for the GPTQ formats where its reader (optimum and gptqmodel) is not installed: then
    their weights are dequantized.

    Args:
        model: Folder, `.gguf` file, hub id, or `smollm2`.
        tokenizer: Whether to load the tokenizer.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        The model and its tokenizer (None if it was not wanted).

    Raises:
        ValueError: If there is no model or no tokenizer.
    """
    transformers = require("transformers", "quantease[hf]")
    require("quantease.hf", "quantease[hf]")  # registers the native format
    path = smollm2_path() if model == "smollm2" else Path(model)
    check_place(path)
    if path.suffix == ".gguf":
        return open_gguf(path, torch.float32)
    trust = {"trust_remote_code": trust_remote_code}
    place = str(path) if path.is_dir() else model
    with foreign(model):
        if _method(path) == "gptq" and not all(map(importlib.util.find_spec, ("optimum", "gptqmodel"))):
            loaded = gptq.load(path, torch.float32)
        else:
            config = transformers.AutoConfig.from_pretrained(place, **trust)
            loaded = auto_class(config, **trust).from_pretrained(place, **trust).eval()
        return loaded, transformers.AutoTokenizer.from_pretrained(place, **trust) if tokenizer else None


def _method(folder: Path) -> str | None:
    file = folder / "config.json"
    if not file.exists():
        return None
    with reading(file, "the configuration of a model"):
        method: str | None = (read_json(file).get("quantization_config") or {}).get("quant_method")
        return method


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: Path | str | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy on tasks of lm-eval, which must be installed.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        tasks: Names of tasks.
        folder: Folder with task files (YAML) of your own, which can read local data.
        limit: Documents per task at most; None takes all.

    Returns:
        `{task: {metric: value}}`, with `<metric>_stderr` beside each.

    Raises:
        ValueError: If lm-eval does not know a task, or cannot get its data.
    """
    harness = require("lm_eval", "lm-eval")
    manager = require("lm_eval.tasks", "lm-eval").TaskManager(include_path=None if folder is None else str(folder))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"tasks: expected names that lm-eval knows, got {', '.join(unknown)}")
    wrapped = require("lm_eval.models.huggingface", "lm-eval").HFLM(pretrained=model, tokenizer=tokenizer)
    try:
        found = harness.simple_evaluate(
            model=wrapped, tasks=list(tasks), num_fewshot=0, limit=limit, task_manager=manager, verbosity="ERROR"
        )
    except (OSError, ConnectionError) as error:
        raise ValueError(f"tasks: lm-eval cannot get the data of {', '.join(tasks)} ({error})") from error
    return {task: _figures(values) for task, values in found["results"].items()}


def _figures(values: dict[str, Any]) -> dict[str, float]:
    # lm-eval names a metric "acc,none"; what is no number ("N/A", the alias) is left out.
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, Real) and math.isfinite(float(value))
    }
