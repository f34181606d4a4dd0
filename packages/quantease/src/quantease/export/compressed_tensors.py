"""The `pack-quantized` format of compressed-tensors, which transformers, vLLM and SGLang load.

A linear layer is stored as `weight_packed` (codes as a dense little-endian bit stream per row), `weight_scale`
(out, groups), `weight_shape`, and, where zero points differ, `weight_zero_point` packed along the outputs. Experts that
transformers fuses into one parameter are stored one by one, as in the checkpoints they come from; on symmetric grids
only, since transformers' reader of packed experts knows no zero points.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from core_tensor import pack_bits
from core_tensor.app.extras import require
from torch import Tensor, nn

from quantease.model.causal_lm import CausalLM
from quantease.model.matrices import Matrix, find_matrices
from quantease.model.plan import Blocks, ModelConfig
from quantease.model.quantize_model import QuantizedCausalLM
from quantease.problem.layer import QuantizedLayer


def check(lm: CausalLM, config: ModelConfig, matrices: Blocks) -> None:
    """Refuse what the format cannot hold.

    Args:
        lm: The model.
        config: How it is quantized.
        matrices: The quantized matrices of every block.

    Raises:
        ValueError: If there are outliers, matrices that are neither `nn.Linear` nor experts that checkpoints store one
            by one, experts on asymmetric grids, groups of unequal size, or mixed bits that transformers would not read.
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
        _check_experts(lm, index, block_matrices, symmetric=layer.symmetric)
        for matrix in block_matrices:
            if matrix.expert is None and matrix.transposed:
                raise ValueError(f"format: compressed-tensors holds nn.Linear layers, not {matrix.name}; use dense")
            features = matrix.weight(lm.block(index)).shape[1]
            if layer.group_size > 0 and features % layer.group_size:
                raise ValueError(
                    f"format: compressed-tensors needs inputs divisible by the group size {layer.group_size}, "
                    f"got {features} in {matrix.name}; use native or dense"
                )


def _check_experts(lm: CausalLM, index: int, matrices: Sequence[Matrix], *, symmetric: bool) -> None:
    """Refuse fused experts that no reader finds packed."""
    chosen = Counter(m.parameter for m in matrices if m.expert is not None)
    for name, count in chosen.items():
        values = lm.block(index).get_parameter(name)
        one_by_one = values.ndim == 3 and not any(m.transposed for m in matrices if m.parameter == name)
        if not one_by_one or len(_one_by_one(lm, index, {name: values.to("meta")})) < values.shape[0]:
            raise ValueError(
                f"format: compressed-tensors holds experts that checkpoints store one by one, not {name}; use dense"
            )
        if count < values.shape[0]:
            raise ValueError(f"format: compressed-tensors needs all experts of {name} quantized; use dense")
        if not symmetric:
            raise ValueError(
                f"format: transformers reads packed experts ({name}) on symmetric grids only; use --symmetric "
                "(symmetric=True) or dense"
            )


def _one_by_one(lm: CausalLM, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a block under the names of checkpoints, which have one per expert."""
    loading = require("transformers.core_model_loading", "quantease[hf]")
    named = {f"{lm.blocks[index]}.{name}": value for name, value in tensors.items()}
    found: dict[str, Tensor] = loading.revert_weight_conversion(lm.skeleton, named)
    return found


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
    packed_embeddings = _embeddings(quantized)
    if packed_embeddings or not layer.symmetric or not _all_plain(quantized.lm, quantized.matrices):
        # transformers would build a skeleton of packed modules, which fails for packed zero points (another shape),
        # layers whose initialization looks for `weight`, embeddings, and experts, which are no modules; so it
        # dequantizes while loading.
        values["dequantize"] = True
    return values


def _targets(quantized: QuantizedCausalLM) -> dict[int, list[str]]:
    """Modules by their bits: one class where all have the same, else names."""
    ends = [m.name for m in quantized.ends]  # vLLM and SGLang look for heads and embeddings by name
    if quantized.config.average_bits is None:
        return {quantized.config.layer.bits: ["Linear", *ends]}
    names = {quantized.config.layer.bits: ends} if ends else {}
    for index, matrix, layer in quantized.layers():
        names.setdefault(layer.bits, []).append(f"{quantized.lm.blocks[index]}.{matrix.name}")
    return dict(sorted(names.items()))


def _embeddings(quantized: QuantizedCausalLM) -> bool:
    skeleton = quantized.original.skeleton
    return any(isinstance(skeleton.get_submodule(m.name), nn.Embedding) for m in quantized.ends)


def _all_plain(lm: CausalLM, matrices: Blocks) -> bool:
    plain = all(
        m.expert is None and type(lm.block(i).get_submodule(m.name)) is nn.Linear
        for i, ms in enumerate(matrices)
        for m in ms
    )
    kinds = {tuple(m.name for m in ms): index for index, ms in enumerate(matrices)}
    return plain and not any(_initializes_layers(lm, index, matrices[index]) for index in kinds.values())


def _initializes_layers(lm: CausalLM, index: int, matrices: Sequence[Matrix]) -> bool:
    """Whether what holds the layers looks for their `weight` when transformers initializes it (Mamba, GPT-BigCode)."""
    block = copy.deepcopy(lm.block(index))  # on the meta device
    for matrix in matrices:
        del block.get_submodule(matrix.name)._parameters["weight"]
    with torch.random.fork_rng(), torch.no_grad():
        try:
            for module in block.modules():
                if not isinstance(module, nn.Linear):
                    lm.skeleton._init_weights(module)
        except Exception:  # no `weight`, or something that cannot be tried on the meta device: then rather dequantize
            return True
    return False


def _left_alone(quantized: QuantizedCausalLM) -> list[str]:
    lm = quantized.lm
    chosen = {f"{lm.blocks[i]}.{m.name}" for i, ms in enumerate(quantized.matrices) for m in ms}
    chosen |= {m.name for m in quantized.ends}
    everything = {m.name for m in find_matrices(lm.skeleton, skip=()) if m.expert is None}
    routers = {name for i, ms in enumerate(quantized.matrices) for name in _routers(lm, i, ms)}
    return sorted(everything - chosen | routers)


def _routers(lm: CausalLM, index: int, matrices: Sequence[Matrix]) -> list[str]:
    """What other readers build as linear layers beside packed experts, though transformers does not."""
    if all(m.expert is None for m in matrices):
        return []
    taken = {m.parameter for m in matrices}
    rest = {n: p.to("meta") for n, p in lm.block(index).named_parameters() if p.ndim == 2 and n not in taken}
    return [name.removesuffix(".weight") for name in _one_by_one(lm, index, rest) if name.endswith(".weight")]


def block(quantized: QuantizedCausalLM, index: int) -> dict[str, Tensor]:
    """Tensors of a block.

    Args:
        quantized: The model.
        index: Number of the block.

    Returns:
        Tensors by name.
    """
    lm = quantized.lm
    matrices = quantized.matrices[index] if index < len(quantized.matrices) else ()
    tensors = quantized.beside(index)
    experts: dict[str, list[QuantizedLayer]] = {}
    for matrix in matrices:
        layer = quantized.store.load(index, matrix.name)
        if matrix.expert is not None:
            experts.setdefault(matrix.parameter, []).append(layer)
            continue
        del tensors[f"{matrix.name}.weight"]
        tensors |= _packed(f"{matrix.name}.weight", layer.codes, layer.scales, layer, lm.dtype)
    if not experts:
        return {f"{lm.blocks[index]}.{name}": value for name, value in tensors.items()}
    # what takes fused weights apart does the same to codes and scales, whose rows are those of the weights
    codes = _one_by_one(lm, index, {name: torch.stack([e.codes for e in found]) for name, found in experts.items()})
    scales = _one_by_one(lm, index, {name: torch.stack([e.scales for e in found]) for name, found in experts.items()})
    any_layer = next(iter(experts.values()))[0]
    found = _one_by_one(lm, index, {name: value for name, value in tensors.items() if name not in experts})
    for name, part in codes.items():
        found |= _packed(name, part.contiguous(), scales[name].contiguous(), any_layer, lm.dtype)
    return found


def ends(quantized: QuantizedCausalLM) -> dict[str, Tensor]:
    """Tensors of the quantized matrices outside the blocks.

    Args:
        quantized: The model.

    Returns:
        Tensors by name, in the place of `<matrix>.weight`.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in quantized.end_layers().items():
        tensors |= _packed(f"{name}.weight", layer.codes, layer.scales, layer, quantized.lm.dtype)
    return tensors


def _packed(name: str, codes: Tensor, scales: Tensor, layer: QuantizedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """What stands for a weight: of a layer, or of an expert's part of one (on symmetric grids)."""
    tensors = {
        f"{name}_packed": pack_bits(codes, layer.bits),
        f"{name}_scale": scales.to(dtype),
        f"{name}_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if not layer.symmetric:
        packed = pack_bits(layer.zeros.T.contiguous(), layer.bits)  # (groups, ceil(out b / 32))
        tensors[f"{name}_zero_point"] = packed.T.contiguous()
    return tensors
