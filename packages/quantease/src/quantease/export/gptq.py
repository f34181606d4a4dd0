"""The formats `gptq` and `gptq_v2`, which GPTQModel, transformers (with optimum), vLLM and SGLang load.

A layer with p inputs, q outputs and G groups is stored as `qweight` (p b / 32, q), a little-endian bit stream of codes
along the inputs, `qzeros` (G, q b / 32), zero points as a stream along the outputs, `scales` (G, q) and `g_idx` (p,),
the group of every input. `gptq_v2` stores the zero points z, `gptq` stores z - 1 in every field of b bits.
"""

import re
from pathlib import Path
from typing import Any

import torch
from core_tensor import pack_bits, unpack_bits
from core_tensor.app.extras import require
from torch import Tensor, nn

from quantease.model.causal_lm import CausalLM
from quantease.model.matrices import find_matrices
from quantease.model.plan import Blocks, ModelConfig
from quantease.model.quantize_model import QuantizedCausalLM
from quantease.model.weights import SafetensorsWeights

BITS = (2, 3, 4, 8)
_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
_FIELDS = 32  # both dimensions of a layer are packed into whole words of 32 bits


def check(lm: CausalLM, config: ModelConfig, matrices: Blocks) -> None:
    """Refuse what neither format can hold.

    Args:
        lm: The model.
        config: How it is quantized.
        matrices: The quantized matrices of every block.

    Raises:
        ValueError: If bits (also mixed ones), outliers, a layer's shape, or its group size do not fit.
    """
    layer = config.layer
    if config.average_bits is not None:
        raise ValueError("format: transformers reads gptq with one number of bits only; use compressed-tensors")
    if layer.bits not in BITS:
        raise ValueError(f"format: gptq has {', '.join(map(str, BITS))} bits, not {layer.bits}; use compressed-tensors")
    if layer.outliers:
        raise ValueError("format: gptq has no outliers; use native or dense")
    for index, block_matrices in enumerate(matrices):
        for matrix in block_matrices:
            if matrix.expert is not None or type(lm.block(index).get_submodule(matrix.name)) is not nn.Linear:
                # transformers' reader leaves subclasses of nn.Linear as they are, with random weights, and fails for
                # GPT-2's Conv1D
                raise ValueError(f"format: gptq holds plain nn.Linear layers, not {matrix.name}; use native or dense")
            out, features = matrix.weight(lm.block(index)).shape
            if out % _FIELDS or features % _FIELDS:
                raise ValueError(
                    f"format: gptq needs inputs and outputs divisible by {_FIELDS}, got {features} and {out} in "
                    f"{matrix.name}; use compressed-tensors"
                )
            if layer.group_size > 0 and features % layer.group_size:
                raise ValueError(
                    f"format: gptq needs inputs divisible by the group size {layer.group_size}, got {features} in "
                    f"{matrix.name}; use native or dense"
                )


def config(quantized: QuantizedCausalLM, version: int) -> dict[str, Any]:
    """The `quantization_config` of `config.json`.

    Args:
        quantized: The model.
        version: 1 for `gptq`, 2 for `gptq_v2`.

    Returns:
        Its values.
    """
    layer, lm = quantized.config.layer, quantized.lm
    name = "gptq" if version == 1 else "gptq_v2"
    values: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": layer.bits,
        "group_size": layer.group_size,
        "sym": layer.symmetric,
        "desc_act": False,  # groups are consecutive inputs; `g_idx` says so too
        "true_sequential": quantized.config.order == "layer",
        "lm_head": False,
        "format": name,
        "checkpoint_format": name,  # the older name of the same key, which vLLM reads
        "block_name_to_quantize": lm.blocks[0].rpartition(".")[0],
        "meta": {"quantizer": ["quantease"], "algorithm": layer.algorithm},
    }
    packed = [f"{lm.blocks[i]}.{m.name}" for i, matrices in enumerate(quantized.matrices) for m in matrices]
    inside = tuple(f"{block}." for block in lm.blocks)
    left = [m.name for m in find_matrices(lm.skeleton, skip=()) if m.name.startswith(inside) and m.name not in packed]
    if left:  # readers take every linear layer of a block for packed, unless told otherwise
        values["modules_in_block_to_quantize"] = [packed]  # transformers
        values["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left}  # GPTQModel, vLLM
    return values


def block(quantized: QuantizedCausalLM, index: int, version: int) -> dict[str, Tensor]:
    """Tensors of a block.

    Args:
        quantized: The model.
        index: Number of the block.
        version: 1 for `gptq`, 2 for `gptq_v2`.

    Returns:
        Tensors by name.

    Raises:
        ValueError: If a zero point is 0 in version 1, whose field for z - 1 would borrow from its neighbour.
    """
    matrices = quantized.matrices[index] if index < len(quantized.matrices) else ()
    tensors = quantized.beside(index)
    for matrix in matrices:
        layer = quantized.store.load(index, matrix.name)
        if version == 1 and bool((layer.zeros == 0).any()):
            raise ValueError(
                f"format: gptq stores zero points less one, which the zero point 0 in {quantized.lm.blocks[index]}."
                f"{matrix.name} does not survive; use gptq_v2"
            )
        zeros = layer.zeros.T.contiguous() - (2 - version)  # (G, q)
        del tensors[f"{matrix.name}.weight"]
        tensors |= {
            f"{matrix.name}.qweight": pack_bits(layer.codes, layer.bits).T,
            f"{matrix.name}.qzeros": pack_bits(zeros, layer.bits),
            f"{matrix.name}.scales": layer.scales.T,
            f"{matrix.name}.g_idx": layer.group.to(torch.int32),
        }
    return {f"{quantized.lm.blocks[index]}.{name}": value for name, value in tensors.items()}


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, version: int) -> Tensor:
    r"""The weights of a stored layer: $\hat W_{ij} = s_{g(j) i} (c_{ji} - z_{g(j) i})$.

    Args:
        qweight: Codes, shape (p bits / 32, q), int32.
        qzeros: Zero points, shape (G, q bits / 32), int32.
        scales: Steps, shape (G, q), floating.
        g_idx: Group of every input, shape (p,), int32.
        bits: Bits per code.
        version: 1 where one is to be added to the zero points (modulo $2^b$, as other readers do), 2 where not.

    Returns:
        $\hat W$, shape (q, p), float32.
    """
    features, out = len(g_idx), scales.shape[1]
    codes = unpack_bits(qweight.T.contiguous(), bits, features)  # (q, p)
    zeros = (unpack_bits(qzeros, bits, out) + (2 - version)) & (2**bits - 1)  # (G, q)
    group = g_idx.long()
    weight: Tensor = (codes.float() - zeros.float()[group].T) * scales.float()[group].T
    return weight


def load(folder: Path, dtype: torch.dtype) -> Any:
    """A stored model with its weights dequantized; needs neither GPTQModel nor optimum, which transformers asks for.

    Args:
        folder: A checkpoint in one of the formats, ours or not.
        dtype: Of the weights.

    Returns:
        A transformers model.

    Raises:
        ValueError: If a tensor is missing.
    """
    transformers = require("transformers", "quantease[hf]")
    model_config = transformers.AutoConfig.from_pretrained(folder)
    settings = dict(model_config.quantization_config)
    version = 2 if (settings.get("checkpoint_format") or settings.get("format")) == "gptq_v2" else 1
    del model_config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype).eval()
    weights = SafetensorsWeights(folder, model.base_model_prefix)
    tied = set(model.all_tied_weights_keys)
    for name, value in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if name in tied:
            continue
        if weights.has(f"{stem}.qweight"):
            words, zeros, scales, groups = (weights.load(f"{stem}.{key}") for key in _TENSORS)
            value.copy_(dequantize(words, zeros, scales, groups, settings["bits"], version))
        elif weights.has(name):
            value.copy_(weights.load(name))
        else:
            raise ValueError(f"{folder}: expected a tensor {name}, found none")
    model.tie_weights()
    return model
