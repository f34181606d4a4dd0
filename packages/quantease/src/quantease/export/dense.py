"""Ordinary weights that lie on the grids: loads wherever the original model does."""

from typing import Any

from core_tensor.app.extras import require
from torch import Tensor

from quantease.model.causal_lm import CausalLM
from quantease.model.plan import Blocks, ModelConfig
from quantease.model.quantize_model import QuantizedCausalLM


def check(lm: CausalLM, config: ModelConfig, matrices: Blocks) -> None:
    """Every model can be stored so.

    Args:
        lm: The model.
        config: How it is quantized.
        matrices: The quantized matrices of every block.
    """
    del lm, config, matrices


def config(quantized: QuantizedCausalLM) -> dict[str, Any] | None:
    """No `quantization_config`: nothing about the files is special.

    Args:
        quantized: The model.

    Returns:
        None.
    """
    del quantized
    return None


def block(quantized: QuantizedCausalLM, index: int) -> dict[str, Tensor]:
    """Tensors of a block as transformers stores them (fused experts one by one).

    Args:
        quantized: The model.
        index: Number of the block.

    Returns:
        Tensors by name.
    """
    loading = require("transformers.core_model_loading", "quantease[hf]")
    prefix = quantized.lm.blocks[index]
    with quantized.lm.loaded(index) as module:
        tensors = {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
        reverted: dict[str, Tensor] = loading.revert_weight_conversion(quantized.lm.skeleton, tensors)
        return reverted


def ends(quantized: QuantizedCausalLM) -> dict[str, Tensor]:
    """Tensors of the quantized matrices outside the blocks.

    Args:
        quantized: The model.

    Returns:
        Their weights by name.
    """
    return {m.parameter: m.weight(quantized.lm.skeleton) for m in quantized.ends}
