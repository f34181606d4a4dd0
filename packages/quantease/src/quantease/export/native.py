"""quantease's own format: packed codes, scales, zero points and outliers in compressed sparse rows.

`import quantease.hf` teaches transformers to load it; the model then computes from the packed weights.
"""

from typing import Any

from core_tensor.app.extras import require
from torch import Tensor, nn

from quantease.export.nn import QuantizedLinear
from quantease.model.causal_lm import CausalLM
from quantease.model.plan import Blocks, ModelConfig
from quantease.model.quantize_model import QuantizedCausalLM


def check(lm: CausalLM, config: ModelConfig, matrices: Blocks) -> None:
    """Refuse what the format cannot hold.

    Args:
        lm: The model.
        config: How it is quantized.
        matrices: The quantized matrices of every block.

    Raises:
        ValueError: If experts are fused in one parameter, or groups are not multiples of 8.
    """
    del lm
    size = config.layer.group_size
    if size > 0 and size % 8:
        raise ValueError(f"format: native needs a group size that is a multiple of 8, got {size}; use dense")
    for block_matrices in matrices:
        for matrix in block_matrices:
            if matrix.expert is not None:
                raise ValueError(f"format: native holds modules, not {matrix.name} of a fused parameter; use dense")
    require("quantease.hf", "quantease[hf]")


def config(quantized: QuantizedCausalLM) -> dict[str, Any]:
    """The `quantization_config` of `config.json`.

    Args:
        quantized: The model.

    Returns:
        Its values.
    """
    counts: dict[str, int] = {}
    bits: dict[str, int] = {}
    for index, matrix, layer in quantized.layers():
        name = f"{quantized.lm.blocks[index]}.{matrix.name}"
        counts[name] = 0 if layer.outliers is None else len(layer.outliers.values)
        bits[name] = layer.bits
    shared = quantized.config.layer
    values = {"quant_method": "quantease", "bits": shared.bits, "group_size": shared.group_size, "layers": counts}
    return values if quantized.config.average_bits is None else values | {"layer_bits": bits}


def block(quantized: QuantizedCausalLM, index: int) -> dict[str, Tensor]:
    """Tensors of a block.

    Args:
        quantized: The model.
        index: Number of the block.

    Returns:
        Tensors by name.
    """
    matrices = quantized.matrices[index] if index < len(quantized.matrices) else ()
    tensors = quantized.beside(index)
    for matrix in matrices:
        packed: nn.Module = QuantizedLinear.from_layer(quantized.store.load(index, matrix.name))
        del tensors[f"{matrix.name}.weight"]
        tensors |= {f"{matrix.name}.{name}": value for name, value in packed.state_dict().items()}
    return {f"{quantized.lm.blocks[index]}.{name}": value for name, value in tensors.items()}
