r"""GGUF files for llama.cpp and what builds on it: a copy of the model's own GGUF file with its layers replaced.

The types whose grids this package's codes lie on exactly are those of symmetric groups of 32 inputs with a float16
scale: `Q4_0`, `Q5_0` and `Q8_0`, which stand for $s (c - 2^{b-1})$. Types with offsets round $s z$ to float16, and
those of fewer bits store scales in two levels; neither holds what was optimized. Metadata, tokenizer, embeddings and
norms are taken over from the file that the model was opened from (llama.cpp's converter makes one of any checkpoint
that it knows), so nothing of that has to be guessed: names come from the `gguf` package, and the order of rows, which
differs for the queries and keys of some architectures, is found by comparing the file's weights with the model's.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from core_tensor.app.extras import require
from torch import Tensor

from quantease.model.causal_lm import CausalLM, open_gguf
from quantease.model.matrices import Matrix
from quantease.model.plan import Blocks, ModelConfig
from quantease.model.quantize_model import QuantizedCausalLM
from quantease.problem.layer import QuantizedLayer

GROUP = 32
TYPES = {4: ("Q4_0", 2), 5: ("Q5_0", 8), 8: ("Q8_0", 7)}
"""Type of the tensors, and of the file, by bits."""


def check(lm: CausalLM, config: ModelConfig, matrices: Blocks) -> None:
    """Refuse what the format cannot hold.

    Args:
        lm: The model.
        config: How it is quantized.
        matrices: The quantized matrices of every block.

    Raises:
        ValueError: If the model does not come from a GGUF file, its grid is none of GGUF's, or its weights lie in the
            file in another form.
    """
    require("gguf", "quantease[gguf]")
    layer = config.layer
    if lm.source is None or lm.source.suffix != ".gguf":
        raise ValueError(
            "format: gguf takes metadata and tokenizer from the model's own GGUF file; convert the model with "
            "llama.cpp's convert_hf_to_gguf.py and quantize that file"
        )
    grid = (layer.symmetric, layer.group_size, layer.scale_dtype)
    if layer.bits not in TYPES or grid != (True, GROUP, "float16") or layer.outliers or config.average_bits is not None:
        raise ValueError(
            "format: gguf holds 4, 5 or 8 bits on symmetric groups of 32 without outliers (--symmetric --group-size "
            "32): its other types do not hold the grids that are optimized here exactly"
        )
    if config.tunes("block") or config.tunes("model"):
        raise ValueError("format: gguf takes the norms from the model's file, so tuning is not for it; use --tune none")
    source = _File(lm.source)
    names = source.names(lm, matrices)
    for index, chosen in enumerate(matrices[:1]):
        with lm.loaded(index) as block:
            for matrix in chosen:
                _row_order(
                    lm, matrix.weight(block), source.values(names[index, matrix.name]), names[index, matrix.name]
                )


class _File:
    """A GGUF file and how its tensors are called."""

    def __init__(self, path: Path) -> None:
        self.module = require("gguf", "quantease[gguf]")
        self.reader = self.module.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.architecture = self.reader.get_field("general.architecture").contents()

    def values(self, name: str) -> Tensor:
        """A tensor of the file, dequantized."""
        tensor = self.tensors[name]
        return torch.tensor(
            self.module.quants.dequantize(tensor.data, tensor.tensor_type)
        )  # a copy: files are read-only

    def names(self, lm: CausalLM, matrices: Blocks) -> dict[tuple[int, str], str]:
        """What the matrices are called in the file."""
        kinds = {name: kind for kind, name in self.module.MODEL_ARCH_NAMES.items()}
        known = self.module.get_tensor_name_map(kinds[self.architecture], len(lm.blocks))
        found = {}
        for index, chosen in enumerate(matrices):
            for matrix in chosen:
                full = f"{lm.blocks[index]}.{matrix.name}"
                stem = None if matrix.expert is not None else known.get_name(full)
                if stem is None or f"{stem}.weight" not in self.tensors:
                    raise ValueError(f"format: gguf has no tensor of its own for {full}; use another format")
                found[index, matrix.name] = f"{stem}.weight"
        return found


def _row_order(lm: CausalLM, weight: Tensor, stored: Tensor, name: str) -> Tensor:
    """Which rows of W the file's tensor holds, in its order."""
    stored = stored.to(weight.device, weight.dtype)
    for order in _orders(lm, weight.shape[0]):
        if stored.shape == weight.shape and torch.equal(stored, weight[order]):
            return order
    raise ValueError(f"format: the GGUF file holds {name} in another form than the model; use another format")


def _orders(lm: CausalLM, rows: int) -> Iterator[Tensor]:
    yield torch.arange(rows)
    config = lm.skeleton.config.get_text_config(decoder=True)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads and rows % (2 * heads) == 0:  # rotary pairs: halves in transformers, neighbors in llama.cpp
            yield torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def packed(layer: QuantizedLayer, order: Tensor) -> Any:
    """The bytes of a layer.

    Args:
        layer: A layer with symmetric groups of 32.
        order: Its rows in the order of the file, shape (q,), int64.

    Returns:
        Array of shape (q, bytes per row), uint8.
    """
    numpy = require("numpy", "quantease[gguf]")
    rows = len(order)
    codes = layer.codes[order].reshape(rows, -1, GROUP)  # (q, G, 32)
    scales = layer.scales[order].contiguous().view(torch.uint8).reshape(rows, -1, 2)
    if layer.bits == 8:
        body = [codes ^ 0x80]  # c - 128 in two's complement
    else:
        low = codes & 15
        body = [low[..., :16] | low[..., 16:] << 4]
        if layer.bits == 5:
            body.insert(0, torch.from_numpy(numpy.packbits((codes >> 4).numpy(), axis=-1, bitorder="little")))
    return torch.cat([scales, *body], -1).reshape(rows, -1).contiguous().numpy()


def write(quantized: QuantizedCausalLM, path: Path) -> None:
    """Write the file and compare every layer in it, read back by the `gguf` package, bit for bit.

    Args:
        quantized: A model that `check` allows.
        path: Where to.

    Raises:
        ValueError: If a layer does not come back as it was written.
    """
    assert quantized.original.source is not None
    source = _File(quantized.original.source)
    module, (type_name, file_type) = source.module, TYPES[quantized.config.layer.bits]
    kind = module.GGMLQuantizationType[type_name]
    names = source.names(quantized.original, quantized.matrices)
    orders: dict[str, Tensor] = {}
    replaced: dict[str, Any] = {}
    for index, chosen in enumerate(quantized.matrices):
        with quantized.original.loaded(index) as block:
            for matrix in chosen:
                name = names[index, matrix.name]
                orders[name] = _row_order(quantized.original, matrix.weight(block), source.values(name), name)
                replaced[name] = packed(quantized.store.load(index, matrix.name, matrix.weight(block)), orders[name])
    writer = module.GGUFWriter(path, source.architecture)
    _copy_metadata(source, writer, file_type)
    for tensor in source.reader.tensors:
        if tensor.name in replaced:
            writer.add_tensor(tensor.name, replaced[tensor.name], raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _compare(quantized, _File(path), names, orders)


def _copy_metadata(source: _File, writer: Any, file_type: int) -> None:
    array = source.module.GGUFValueType.ARRAY
    for field in source.reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in {"general.architecture", "general.file_type"}:
            continue
        element = field.types[-1] if field.types[0] == array else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    writer.add_file_type(file_type)
    if "general.quantization_version" not in source.reader.fields:
        writer.add_quantization_version(source.module.GGML_QUANT_VERSION)


def _compare(
    quantized: QuantizedCausalLM, saved: _File, names: dict[tuple[int, str], str], orders: dict[str, Tensor]
) -> None:
    matrix: Matrix
    for index, matrix, layer in quantized.layers():
        name = names[index, matrix.name]
        if not torch.equal(saved.values(name), layer.dequantize()[orders[name]]):
            raise ValueError(f"format: {name} does not come back from the GGUF file as it was written")


def load(path: Path, dtype: torch.dtype) -> Any:
    """Load a saved file with transformers.

    Args:
        path: The file.
        dtype: Of the weights.

    Returns:
        A transformers model.
    """
    return open_gguf(path, dtype)[0]
