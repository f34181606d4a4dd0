"""A rehearsal before any work: a few random blocks quantized by rounding, saved in the asked format, loaded again."""

import copy
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from core_tensor.app.ranks import current
from torch import nn

from quantease.export.save import GGUF, export_model
from quantease.model.causal_lm import CausalLM, find_blocks, open_causal_lm
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import quantize_model


def rehearse(lm: CausalLM, config: ModelConfig, format: str, folder: Path) -> None:  # noqa: A002
    """Find out whether a run will end in a model that loads, before it begins.

    The model is rebuilt with random weights and only as many blocks as show every kind it has; these are quantized by
    rounding, saved in the format, loaded again by transformers and compared. So a configuration that cannot be written,
    a layer that a reader does not know, a full disk and the like show in seconds instead of hours.

    Args:
        lm: The model.
        config: How it will be quantized.
        format: Name of the format.
        folder: Where the model will be saved; the rehearsal is written beside it and removed.

    Raises:
        ValueError: If the saved model does not load, or computes something else.
    """
    if format == GGUF:
        return  # its layers are put into the file that the model came from, which `check_format` has looked at
    ranks = current()
    if config.layer.outliers:
        layer = replace(config.layer, algorithm="quantease-paper", sweeps=1, relax=0, shrinkage="none")
    else:
        layer = replace(config.layer, algorithm="rtn", shrinkage="none")
    changed = replace(config, layer=layer, outlier_budget="layer")
    tokens = torch.arange(8).repeat(ranks.size, 1)
    failure: Exception | None = None
    with ExitStack() as stack:
        place = ""
        try:
            if ranks.first:
                folder.parent.mkdir(parents=True, exist_ok=True)
                place = stack.enter_context(_beside(folder))
        except OSError as error:
            failure = error
        place, failure = ranks.share((place, failure))
        if failure is None:
            try:
                small = open_causal_lm(_few_blocks(lm), device=lm.device)
                run = quantize_model(small, tokens, Path(place) / "run", changed)
                if ranks.first:
                    export_model(run, Path(place) / "model", format)
            except Exception as error:  # whatever transformers or a reader stumbles over would stop the run at its end
                failure = error
            failure = ranks.share(failure)
    if isinstance(failure, OSError) and failure.errno is not None:
        raise failure
    if failure is not None:
        why = " ".join(f"{failure}".split()) or type(failure).__name__
        raise ValueError(f"format: {lm.name} cannot be saved as {format} and loaded again ({why})") from failure


def _beside(folder: Path) -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix=f".rehearsal-{folder.name}-", dir=folder.parent)


def _few_blocks(lm: CausalLM) -> Any:
    """A model of the same class with random weights and the blocks up to the first one of the last kind."""
    kinds: dict[tuple[Any, ...], int] = {}
    for index in range(len(lm.blocks)):
        block = lm.block(index)
        kind = (type(block).__name__, *((name, tuple(p.shape)) for name, p in block.named_parameters()))
        kinds.setdefault(kind, index)
    model = None
    if max(kinds.values()) + 1 < len(lm.blocks):
        try:
            model = _built(lm, _cut(lm.skeleton.config, len(lm.blocks), max(kinds.values()) + 1))
            find_blocks(model)
        except Exception:  # a configuration that only makes sense at its full depth: then all blocks
            model = None
    return model or _built(lm, copy.deepcopy(lm.skeleton.config))


def _built(lm: CausalLM, config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = type(lm.skeleton)._from_config(config, dtype=lm.dtype).eval()
    return model


def _cut(config: Any, depth: int, blocks: int) -> Any:
    """A configuration of fewer blocks: its depth, and every list with an entry per block."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    for part in {id(c): c for c in (config, text)}.values():
        for name, value in vars(part).items():
            if isinstance(value, list | tuple) and len(value) == depth:
                setattr(part, name, type(value)(value[:blocks]))
    text.num_hidden_layers = blocks
    return config
