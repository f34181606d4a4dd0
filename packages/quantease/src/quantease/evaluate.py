"""Models as users load them, for evaluation: perplexity by `quantease.perplexity`, zero-shot tasks by lm-eval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from core_tensor.extras import require

from quantease.causal_lm import check_place
from quantease.smollm2 import smollm2_path


def load_for_evaluation(model: str) -> tuple[Any, Any]:
    """Load a model, quantized or not, and its tokenizer with transformers.

    Args:
        model: Folder, `.gguf` file, hub id, or `smollm2`.

    Returns:
        The model and its tokenizer.

    Raises:
        ValueError: If there is no model.
    """
    transformers = require("transformers", "quantease[hf]")
    path = smollm2_path() if model == "smollm2" else Path(model)
    check_place(path)
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "dtype": torch.float32}
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(**place).eval()
        place.pop("dtype", None)
        return loaded, transformers.AutoTokenizer.from_pretrained(**place)
    except OSError as error:
        raise ValueError(f"model: transformers cannot load {model} ({str(error).splitlines()[0]})") from error


def zero_shot(model: Any, tokenizer: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """Accuracy on tasks of lm-eval, which must be installed.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        tasks: Names of tasks.

    Returns:
        `{task: {metric: value}}`.
    """
    harness = require("lm_eval", "lm-eval")
    wrapped = require("lm_eval.models.huggingface", "lm-eval").HFLM(pretrained=model, tokenizer=tokenizer)
    results: dict[str, Any] = harness.simple_evaluate(model=wrapped, tasks=list(tasks), num_fewshot=0)["results"]
    return results
