"""Saves a quantized model in the formats that other tools load, and proves every save by loading it again."""

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from core_tensor.app.extras import require
from core_tensor.app.files import atomic_path, sweep, write_json
from core_tensor.checks import check_choice
from safetensors.torch import save_file
from torch import Tensor

from quantease.export import compressed_tensors, dense, gguf, gptq, native
from quantease.model.block_stream import BlockStream
from quantease.model.causal_lm import ACCOMPANYING, CausalLM, auto_class
from quantease.model.plan import Blocks, ModelConfig, model_matrices
from quantease.model.quantize_model import QuantizedCausalLM

Tensors = dict[str, Tensor]

MARK = "quantease.json"
"""File that says that the model beside it is one that this module saved, and may save anew."""

_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf", "*.pt", "*.pth")
_EPSILONS = 8  # of the model's dtype: how far logits may differ after reloading, relative to the greatest; 1e-6 in fp32


@dataclass(frozen=True)
class Format:
    """How a format stores a model.

    Attributes:
        block: Tensors of a block, by their names in the model's state dict.
        config: What `config.json` says under `quantization_config`, or None.
        check: Raises ValueError where the format cannot hold the model.
        load: Loads a saved folder in a dtype as a transformers model.
        ends: Tensors of the quantized matrices outside the blocks; None where the format has none of them.
    """

    block: Callable[[QuantizedCausalLM, int], Tensors]
    config: Callable[[QuantizedCausalLM], dict[str, Any] | None]
    check: Callable[[CausalLM, ModelConfig, Blocks], None]
    load: Callable[[Path, torch.dtype], Any]
    ends: Callable[[QuantizedCausalLM], Tensors] | None = None


def pretrained(folder: Path, dtype: torch.dtype) -> Any:
    """Load a saved model the way its users will.

    Args:
        folder: The saved model.
        dtype: Of its weights.

    Returns:
        A transformers model.
    """
    transformers = require("transformers", "quantease[hf]")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=_brings_code(folder))
    trust = {"trust_remote_code": _brings_code(folder)}
    return auto_class(config, **trust).from_pretrained(folder, dtype=dtype, **trust).eval()


def _brings_code(folder: Path) -> bool:
    """Whether Python code was saved beside a model: that of a model opened with `trust_remote_code`."""
    return any(folder.glob("*.py"))


FORMATS = {
    "compressed-tensors": Format(
        compressed_tensors.block,
        compressed_tensors.config,
        compressed_tensors.check,
        pretrained,
        compressed_tensors.ends,
    ),
    "gptq": Format(partial(gptq.block, version=1), partial(gptq.config, version=1), gptq.check, gptq.load),
    "gptq_v2": Format(partial(gptq.block, version=2), partial(gptq.config, version=2), gptq.check, gptq.load),
    "dense": Format(dense.block, dense.config, dense.check, pretrained, dense.ends),
    "native": Format(native.block, native.config, native.check, pretrained),
}


GGUF = "gguf"
"""The one format that is a single file without `config.json`; see `export.gguf`."""


@dataclass(frozen=True)
class ExportReport:
    """What was saved.

    Attributes:
        format: Name of the format.
        files: Names of the files, in order.
        bytes: Their size.
        logit_difference: Greatest difference between the reloaded model's logits and those of the model in memory,
            relative to the greatest logit.
    """

    format: str
    files: tuple[str, ...]
    bytes: int
    logit_difference: float

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON.

        Returns:
            Plain values.
        """
        return asdict(self) | {"files": list(self.files)}


def check_format(lm: CausalLM, config: ModelConfig, format: str) -> None:  # noqa: A002
    """Refuse a format that cannot hold a model, before any work on it.

    Args:
        lm: The model.
        config: How it will be quantized.
        format: Name of the format.

    Raises:
        ValueError: If the format cannot hold it.
    """
    check_choice("format", format, (*FORMATS, GGUF))
    if (config.lm_head or config.embeddings) and (format == GGUF or FORMATS[format].ends is None):
        raise ValueError(
            f"format: {format} keeps lm_head and embeddings at full precision; use compressed-tensors or dense"
        )
    check = gguf.check if format == GGUF else FORMATS[format].check
    check(lm, config, model_matrices(lm, config))


def export_model(
    quantized: QuantizedCausalLM,
    folder: Path | str,
    format: str = "compressed-tensors",  # noqa: A002  # the name that transformers' users know
    *,
    shard_bytes: int = 2 << 30,
) -> ExportReport:
    """Save a quantized model, load it again with `AutoModelForCausalLM`, and compare logits before calling it done.

    The files are written beside their place and moved there after the comparison, so `folder` never holds a model
    that does not load. One block is in memory at a time while saving.

    Args:
        quantized: The model.
        folder: Where `AutoModelForCausalLM.from_pretrained` will find it; other files there are left alone.
        format: Name of the format.
        shard_bytes: A file is closed when it exceeds this.

    Returns:
        What was saved.

    Raises:
        ValueError: If the format cannot hold the model, the reloaded model computes something else, or the folder
            holds a model that is not ours.
    """
    check_choice("format", format, (*FORMATS, GGUF))
    folder = Path(folder)
    check_destination(folder, quantized.original.source)
    check_format(quantized.original, quantized.config, format)
    if format == GGUF:
        return _export_gguf(quantized, folder)
    chosen = FORMATS[format]
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    try:
        # Everything is written into one hidden folder, compared there, and moved; `config.json`, without which nothing
        # loads, comes last.
        with atomic_path(folder / "config.json") as config:
            unproved = config.parent
            _write_weights(unproved, _parts(quantized, chosen), shard_bytes)
            _write_config(config, quantized, chosen)
            _write_company(unproved, quantized.lm)
            difference = _proved(quantized, format, lambda: chosen.load(unproved, quantized.lm.dtype))
            names = tuple(sorted(file.name for file in unproved.iterdir() if file.is_file()))
            for stale in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
                stale.unlink(missing_ok=True)
            for name in names:
                if name != config.name:
                    (unproved / name).replace(folder / name)
        report = ExportReport(format, names, sum((folder / n).stat().st_size for n in names), difference)
        write_json(folder / MARK, report.to_dict())
        return report
    finally:
        if created and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _export_gguf(quantized: QuantizedCausalLM, folder: Path) -> ExportReport:
    path = folder / f"model-{gguf.TYPES[quantized.config.layer.bits][0]}.gguf"
    with atomic_path(path) as unproved:
        gguf.write(quantized, unproved)
        difference = _proved(quantized, GGUF, lambda: gguf.load(unproved, quantized.lm.dtype))
    report = ExportReport(GGUF, (path.name,), path.stat().st_size, difference)
    write_json(folder / MARK, report.to_dict())
    return report


def _proved(quantized: QuantizedCausalLM, format: str, load: Callable[[], Any]) -> float:  # noqa: A002
    """How far the reloaded model is from the one in memory, if that is not too far."""
    difference = logit_difference(quantized, load)
    allowed = _EPSILONS * torch.finfo(quantized.lm.dtype).eps
    if not difference <= allowed:
        raise ValueError(
            f"format: the reloaded {format} model's logits differ by {difference:.2e} of the greatest "
            f"(allowed {allowed:.1e}); nothing was saved"
        )
    return difference


def check_destination(folder: Path, source: Path | None = None) -> None:
    """Refuse to write a model where another one is, before any work.

    Args:
        folder: Where a model would be saved.
        source: Folder or file of the model that is read.

    Raises:
        ValueError: If the folder holds the source, or a model that quantease did not save.
    """
    folder = Path(folder)
    if source is not None and source.resolve() in {folder.resolve(), *(p.resolve() for p in folder.glob("*"))}:
        raise ValueError(f"{folder}: holds the model that is read; choose another folder for the quantized one")
    if folder.is_dir() and not (folder / MARK).exists():
        found = next((p for kind in _MODEL_FILES for p in sorted(folder.glob(kind))), None)
        if found is not None:
            raise ValueError(
                f"{folder}: holds a model that quantease did not save ({found.name}); choose another folder"
            )
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder to save the model in, found a file")


def logit_difference(quantized: QuantizedCausalLM, load: Callable[[], Any], length: int = 32) -> float:
    """Compare the logits of a reloaded model with those of the model in memory, on two random windows.

    Args:
        quantized: The model in memory (streamed).
        load: Loads the saved model for transformers; called last, so that no block is in memory beside it.
        length: Tokens of each window.

    Returns:
        Greatest difference relative to the greatest logit.
    """
    vocabulary = quantized.lm.skeleton.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (2, length), generator=generator)
    stream = BlockStream(quantized.lm, tokens)
    for index in range(len(quantized.lm.blocks)):
        with quantized.lm.loaded(index) as block:
            stream.advance(index, block)
    expected = torch.stack([stream.logits(w).cpu().float() for w in range(len(tokens))])
    model = load()
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        got = torch.cat([model(input_ids=window[None], use_cache=False).logits.cpu().float() for window in tokens])
    return float((got - expected).abs().max() / expected.abs().max())


def _parts(quantized: QuantizedCausalLM, chosen: Format) -> Iterator[Tensors]:
    lm = quantized.lm
    tied = set(lm.skeleton.all_tied_weights_keys)
    prefixes = tuple(f"{block}." for block in lm.blocks)
    outside = {k: v for k, v in lm.skeleton.state_dict().items() if not k.startswith(prefixes) and k not in tied}
    if quantized.ends and chosen.ends is not None:
        for matrix in quantized.ends:
            del outside[matrix.parameter]
        outside |= chosen.ends(quantized)
    yield outside
    for index in range(len(lm.blocks)):
        yield chosen.block(quantized, index)


def _write_weights(folder: Path, parts: Iterable[Tensors], shard_bytes: int) -> None:
    shards: list[Path] = []
    weight_map: dict[str, int] = {}
    pending: Tensors = {}
    total = 0

    def flush() -> None:
        shards.append(folder / f"shard-{len(shards)}.safetensors")
        save_file(pending, shards[-1], metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, len(shards) - 1))
        pending.clear()

    for part in parts:
        size = sum(t.nbytes for t in part.values())
        if pending and size + sum(t.nbytes for t in pending.values()) > shard_bytes:
            flush()
        pending |= {name: tensor.detach().cpu().contiguous() for name, tensor in part.items()}
        total += size
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    index = {name: names[shard] for name, shard in sorted(weight_map.items())}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _write_config(path: Path, quantized: QuantizedCausalLM, chosen: Format) -> None:
    config = copy.deepcopy(quantized.lm.skeleton.config)
    config.architectures = [type(quantized.lm.skeleton).__name__]
    values = json.loads(config.to_json_string(use_diff=False))  # in transformers' own words for infinities
    values["dtype"] = str(quantized.lm.dtype).removeprefix("torch.")
    quantization = chosen.config(quantized)
    if quantization is not None:
        values["quantization_config"] = quantization
    write_json(path, {k: v for k, v in values.items() if k not in {"_name_or_path", "_experts_implementation"}})


def _write_company(folder: Path, lm: CausalLM) -> None:
    """The files beside the weights: tokenizer, chat template, processors, generation settings, code."""
    if lm.source is not None and lm.source.is_dir():
        for pattern in ACCOMPANYING:
            for file in lm.source.glob(pattern):
                if not file.name.endswith((".safetensors.index.json", ".bin.index.json")) and file.name not in {
                    "config.json",
                    MARK,
                }:
                    shutil.copyfile(file, folder / file.name)
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(folder)
    generation = getattr(lm.skeleton, "generation_config", None)
    if generation is not None and not (folder / "generation_config.json").exists():
        generation.save_pretrained(folder)
