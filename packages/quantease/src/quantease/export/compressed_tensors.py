"""The `pack-quantized` format of compressed-tensors, which transformers, vLLM and SGLang load.

A linear layer is stored as `weight_packed` (codes as a dense little-endian bit stream per row), `weight_scale`
(out, groups), `weight_shape`, and, where zero points differ, `weight_zero_point` packed along the outputs.
"""

from typing import Any

import torch
from core_tensor import pack_bits
from torch import Tensor, nn

from quantease.model.causal_lm import CausalLM
from quantease.model.matrices import find_matrices
from quantease.model.plan import Blocks, ModelConfig
from quantease.model.quantize_model import QuantizedCausalLM


def check(lm: CausalLM, config: ModelConfig, matrices: Blocks) -> None:
    """Refuse what the format cannot hold.

    Args:
        lm: The model.
        config: How it is quantized.
        matrices: The quantized matrices of every block.

    Raises:
        ValueError: If there are outliers, matrices that are no `nn.Linear`, groups of unequal size, or mixed bits that
            transformers would not read.
    """
    layer = config.layer
    if layer.outliers:
        raise ValueError("format: compressed-tensors has no outliers; use native or dense")
    if config.average_bits is not None and not (layer.symmetric and _all_plain(lm, matrices)):
        # where transformers dequantizes while loading, it takes all layers for those of the first group
        raise ValueError(
            "format: transformers reads compressed-tensors with different bits per layer only for symmetric grids of "
            "plain nn.Linear layers; use native, dense, or symmetric grids"
        )
    for index, block_matrices in enumerate(matrices):
        for matrix in block_matrices:
            if matrix.expert is not None or matrix.transposed:
                raise ValueError(f"format: compressed-tensors holds nn.Linear layers, not {matrix.name}; use dense")
            features = matrix.weight(lm.block(index)).shape[1]
            if layer.group_size > 0 and features % layer.group_size:
                raise ValueError(
                    f"format: compressed-tensors needs inputs divisible by the group size {layer.group_size}, "
                    f"got {features} in {matrix.name}; use native or dense"
                )


def config(quantized: QuantizedCausalLM) -> dict[str, Any]:
    """The `quantization_config` of `config.json`.

    Args:
        quantized: The model.

    Returns:
        Its values.
    """
    layer = quantized.config.layer
    grouped = layer.group_size > 0
    weights = {
        "type": "int",
        "symmetric": layer.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": layer.group_size if grouped else None,
        "dynamic": False,
        "observer": "minmax",
    }
    values: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": targets, "weights": {"num_bits": bits} | weights}
            for number, (bits, targets) in enumerate(_targets(quantized).items())
        },
        "ignore": _left_alone(quantized),
    }
    if not layer.symmetric or not _all_plain(quantized.lm, quantized.matrices):
        # transformers would build a skeleton of packed modules, which fails for packed zero points (another shape) and
        # for subclasses of nn.Linear whose initialisation looks for `weight`; so it dequantizes while loading.
        values["dequantize"] = True
    return values


def _targets(quantized: QuantizedCausalLM) -> dict[int, list[str]]:
    """Modules by their bits: one class where all have the same, else names."""
    if quantized.config.average_bits is None:
        return {quantized.config.layer.bits: ["Linear"]}
    names: dict[int, list[str]] = {}
    for index, matrix, layer in quantized.layers():
        names.setdefault(layer.bits, []).append(f"{quantized.lm.blocks[index]}.{matrix.name}")
    return dict(sorted(names.items()))


def _all_plain(lm: CausalLM, matrices: Blocks) -> bool:
    return all(
        m.expert is None and type(lm.block(i).get_submodule(m.name)) is nn.Linear
        for i, ms in enumerate(matrices)
        for m in ms
    )


def _left_alone(quantized: QuantizedCausalLM) -> list[str]:
    lm = quantized.lm
    chosen = {f"{lm.blocks[i]}.{m.name}" for i, ms in enumerate(quantized.matrices) for m in ms}
    everything = {m.name for m in find_matrices(lm.skeleton, skip=()) if m.expert is None}
    return sorted(everything - chosen)


def block(quantized: QuantizedCausalLM, index: int) -> dict[str, Tensor]:
    """Tensors of a block.

    Args:
        quantized: The model.
        index: Number of the block.

    Returns:
        Tensors by name.
    """
    prefix = quantized.lm.blocks[index]
    matrices = quantized.matrices[index] if index < len(quantized.matrices) else ()
    tensors = quantized.beside(index)
    for matrix in matrices:
        layer = quantized.store.load(index, matrix.name)
        del tensors[f"{matrix.name}.weight"]
        tensors[f"{matrix.name}.weight_packed"] = pack_bits(layer.codes, layer.bits)
        tensors[f"{matrix.name}.weight_scale"] = layer.scales.to(quantized.lm.dtype)
        tensors[f"{matrix.name}.weight_shape"] = torch.tensor(layer.codes.shape, dtype=torch.int64)
        if not layer.symmetric:
            packed = pack_bits(layer.zeros.T.contiguous(), layer.bits)  # (groups, ceil(out b / 32))
            tensors[f"{matrix.name}.weight_zero_point"] = packed.T.contiguous()
    return {f"{prefix}.{name}": value for name, value in tensors.items()}
