"""A transformers causal language model of which one decoder block at a time is in memory."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from core_tensor.app.devices import check_device
from core_tensor.app.extras import MissingExtraError, require
from torch import Tensor, nn

from quantease.model.weights import ModuleWeights, SafetensorsWeights, WeightSource, assign

ACCOMPANYING = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
"""Files beside the weights: configurations, tokenizers, processors, chat templates, code."""


@dataclass(frozen=True)
class CausalLM:
    """A model whose decoder blocks are loaded one at a time.

    Attributes:
        skeleton: The model with everything but its blocks in memory; the blocks' parameters are on the meta device.
        blocks: Names of the decoder blocks, such as `model.layers.0`, in order.
        weights: Where the blocks' tensors come from.
        tokenizer: The tokenizer, or None.
        name: What was opened, for reports.
        device: Where blocks are run.
        lazy: Whether blocks are read from safetensors; else the whole model is in memory as well.
        source: Folder or file that the model was read from; None for a model object.
        overlay: Called with a block's number and the block after its tensors were loaded, to change them.
    """

    skeleton: Any
    blocks: tuple[str, ...]
    weights: WeightSource
    tokenizer: Any
    name: str
    device: torch.device
    lazy: bool
    source: Path | None = None
    overlay: Callable[[int, nn.Module], None] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the blocks."""
        dtype: torch.dtype = self.skeleton.dtype
        return dtype

    def block(self, index: int) -> nn.Module:
        """A decoder block, which may be on the meta device.

        Args:
            index: Its number.

        Returns:
            The module.
        """
        module: nn.Module = self.skeleton.get_submodule(self.blocks[index])
        return module

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """A decoder block with its tensors; they are released when the context ends.

        Args:
            index: Its number.

        Yields:
            The block, on `device`.
        """
        block, prefix = self.block(index), self.blocks[index]
        names = list(block.state_dict())
        try:
            for name in names:
                assign(block, name, self._load(f"{prefix}.{name}"))
            if self.overlay is not None:
                self.overlay(index, block)
            yield block
        finally:
            for name in names:
                assign(block, name, None)

    def _load(self, name: str) -> Tensor:
        value = self.weights.load(name)
        return value.to(self.device, self.dtype if value.is_floating_point() else None)


def open_causal_lm(
    model: Any,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> CausalLM:
    """Open a causal language model for streaming.

    A folder of safetensors whose names are the model's own is read lazily. A GGUF file, a model object, or a folder
    whose tensors transformers must convert while loading (fused experts) is loaded whole first.

    Args:
        model: A `PreTrainedModel`, a folder, a `.gguf` file or a hub id.
        tokenizer: Replaces the one saved beside the model.
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16`.
        device: Where blocks are run.
        trust_remote_code: Run Python code that comes with the model, which a model outside of transformers needs.

    Returns:
        The model. Of a vision-language model the text part is streamed; the rest stays in memory as it is.

    Raises:
        ValueError: If there is no model, it is quantized already, or its blocks cannot be streamed.
    """
    transformers = require("transformers", "quantease[hf]")
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    check_device("device", device)
    if isinstance(model, nn.Module):
        return _from_module(model, tokenizer, str(getattr(model, "name_or_path", "") or "model"), device)
    path = Path(model)
    check_place(path)
    if path.suffix == ".gguf":
        loaded, own = open_gguf(path, torch.float32 if dtype == "auto" else getattr(torch, dtype))
        return _from_module(loaded, tokenizer or own, path.name, device, source=path)
    folder = path if path.is_dir() else _download(str(model))
    if not (folder / "config.json").exists():
        raise ValueError(f"model: expected a config.json in {model}, found none")
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with foreign(model):
        config = transformers.AutoConfig.from_pretrained(folder, **trust)
        tokenizer = tokenizer or _tokenizer(transformers, folder, **trust)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"model: expected one that is not quantized, but {model} has a quantization_config")
    stored: torch.dtype = (
        (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    )
    with foreign(model):
        skeleton = _skeleton(config, stored, **trust)
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        weights = SafetensorsWeights(folder, skeleton.base_model_prefix)
        if all(weights.has(name) for name in _stored_names(skeleton)):
            return _assemble(skeleton, weights, tokenizer, str(model), device, lazy=True, source=folder)
    with foreign(model):
        loaded = auto_class(config, **trust).from_pretrained(str(folder), dtype=wanted, **trust).eval()
    return _from_module(loaded, tokenizer, str(model), device, source=folder)


def auto_class(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The class of transformers that builds and loads a model with a language model's head.

    Args:
        config: A transformers configuration.
        trust_remote_code: Whether code that comes with the model may say so.

    Returns:
        `AutoModelForCausalLM`, or `AutoModelForImageTextToText` for vision-language models.

    Raises:
        ValueError: If the configuration is of neither kind.
    """
    transformers = require("transformers", "quantease[hf]")
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        found = getattr(transformers, name)
        remote = trust_remote_code and name in (getattr(config, "auto_map", None) or {})
        if remote or type(config) in found._model_mapping:
            return found
    raise ValueError(f"model: expected a causal or vision-language model, got {type(config).__name__}")


def open_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a GGUF file with transformers, whole.

    Args:
        path: The file.
        dtype: Of the weights.

    Returns:
        The model and its tokenizer.

    Raises:
        ValueError: If it is no GGUF file, or one of an architecture that transformers does not convert.
    """
    transformers = require("transformers", "quantease[hf]")
    require("gguf", "quantease[gguf]")
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _quiet_conversion(), _parsed_once(), foreign(path):
        return transformers.AutoModelForCausalLM.from_pretrained(
            dtype=dtype, **place
        ).eval(), transformers.AutoTokenizer.from_pretrained(**place)


@contextmanager
def foreign(model: Any) -> Iterator[None]:
    """Say in one line what transformers says in many about files that it cannot load.

    Args:
        model: What is being loaded.

    Raises:
        ValueError: If it cannot be.
    """
    try:
        yield
    except Exception as error:  # transformers and what it reads with raise whatever they stumble over
        if isinstance(error, MissingExtraError):
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"model: transformers cannot load {model} ({first})") from error


@contextmanager
def _quiet_conversion() -> Iterator[None]:
    """Transformers' bar over the tensors of a GGUF file shows even when standard error is no terminal."""
    module = require("transformers.modeling_gguf_pytorch_utils", "quantease[hf]")
    bar = module.tqdm
    module.tqdm = partial(bar, disable=None)
    try:
        yield
    finally:
        module.tqdm = bar


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Transformers parses a GGUF file three times, value by value through numpy: most of the time of loading."""
    module, numpy = require("gguf", "quantease[gguf]"), require("numpy", "quantease[gguf]")
    loading = require("transformers.modeling_gguf_pytorch_utils", "quantease[hf]")
    before = module.GGUFReader, module.get_tensor_name_map, loading._gguf_parse_value

    class Reader(module.GGUFReader):  # type: ignore[name-defined,misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> Any:
            if (override_order or self.byte_order) == "S":
                return super()._get(offset, dtype, count, override_order)
            return numpy.frombuffer(self.data, dtype, int(count), offset)  # a view of the file, as the original's

    def parse(value: Any, kind: Any) -> Any:
        return bytes(value).decode() if list(kind)[-1:] == [8] else before[2](value, kind)

    module.GGUFReader, module.get_tensor_name_map = cache(Reader), cache(before[1])
    loading._gguf_parse_value = parse
    try:
        yield
    finally:
        module.GGUFReader, module.get_tensor_name_map, loading._gguf_parse_value = before


def check_place(path: Path) -> None:
    """Refuse what can be no model: neither a folder, nor a `.gguf` file, nor a hub id.

    Args:
        path: What the user gave.

    Raises:
        ValueError: If it is none of them.
    """
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model: expected a GGUF file, found none at {path}")
    elif not path.is_dir() and (path.is_absolute() or len(path.parts) != 2):
        raise ValueError(f"model: expected a folder, a .gguf file or a hub id (owner/name), got {path}")


def _from_module(
    model: Any, tokenizer: Any, name: str, device: str | torch.device, source: Path | None = None
) -> CausalLM:
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        if dict(config.quantization_config).get("quant_method") != "gguf" and not _is_gguf(config):
            raise ValueError(f"model: expected one that is not quantized, but {name} has a quantization_config")
        del config.quantization_config
    with _meta_parameters():
        skeleton = type(model)._from_config(config, dtype=model.dtype).eval()  # no registry knows remote code
    skeleton.config._experts_implementation = "eager"
    return _assemble(skeleton, ModuleWeights(model), tokenizer, name, device, lazy=False, source=source)


def _is_gguf(config: Any) -> bool:
    return str(getattr(config.quantization_config, "quant_method", "")).lower().endswith("gguf")


def _tokenizer(transformers: Any, folder: Path, **trust: bool) -> Any:
    present = any((folder / f).exists() for f in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
    return transformers.AutoTokenizer.from_pretrained(folder, **trust) if present else None


def _download(name: str) -> Path:
    hub = require("huggingface_hub", "quantease[hf]")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.safetensors", *ACCOMPANYING]))
    except (OSError, hub.errors.HfHubHTTPError) as error:
        raise ValueError(f"model: {name} is neither a folder here nor could it be downloaded ({error})") from error


def _skeleton(config: Any, dtype: torch.dtype, **trust: bool) -> Any:
    with _meta_parameters():
        skeleton = auto_class(config, **trust).from_config(config, dtype=dtype, **trust).eval()
    skeleton.config._experts_implementation = "eager"  # the form in which every expert's input can be observed
    return skeleton


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Modules built inside have parameters without memory, but real buffers (rotary frequencies are never stored)."""
    register = nn.Module.register_parameter

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = to_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _stored_names(skeleton: Any) -> list[str]:
    # Names of the state dict, a tied tensor once (under the name that checkpoints use for it).
    tied = set(skeleton.all_tied_weights_keys)
    return [name for name in skeleton.state_dict() if name not in tied]


def _assemble(
    skeleton: Any,
    weights: WeightSource,
    tokenizer: Any,
    name: str,
    device: str | torch.device,
    *,
    lazy: bool,
    source: Path | None,
) -> CausalLM:
    blocks = find_blocks(skeleton)
    lm = CausalLM(skeleton, blocks, weights, tokenizer, name, torch.device(device), lazy, source)
    prefixes = tuple(f"{block}." for block in blocks)
    for key in _stored_names(skeleton):
        if not key.startswith(prefixes):
            assign(skeleton, key, lm._load(key))
    skeleton.tie_weights()
    for module in skeleton.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(lm.device)
    return lm


def find_blocks(skeleton: Any) -> tuple[str, ...]:
    """Names of the decoder blocks, in order: the list of modules in the text decoder that holds most of its weights.

    Args:
        skeleton: The model; parameters may be on the meta device.

    Returns:
        Dotted names.

    Raises:
        ValueError: If there is no such list, or blocks share weights.
    """
    decoder = skeleton.get_decoder() if hasattr(skeleton, "get_decoder") else skeleton
    decoder = skeleton if decoder is None else decoder
    prefix = next((name for name, module in skeleton.named_modules() if module is decoder), "")
    lists: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)  # experts and the like
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists[name] = module
    if not lists:
        raise ValueError(f"model: expected a list of decoder blocks in {type(skeleton).__name__}, found none")
    found = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    name, blocks = f"{prefix}.{found}".strip("."), lists[found]
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for key, parameter in block.named_parameters():
            first = owner.setdefault(id(parameter), index)
            if first != index:
                raise ValueError(
                    f"model: blocks {first} and {index} of {type(skeleton).__name__} share {key}, and a shared layer "
                    "has no inputs to be quantized for; such models are not supported"
                )
    return tuple(f"{name}.{i}" for i in range(len(blocks)))
