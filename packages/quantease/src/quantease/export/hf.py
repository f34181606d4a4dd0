"""Teaches transformers the native format: `import quantease.hf`, then `from_pretrained` loads it.

Importing this module registers the quantization method `quantease`: linear layers (and GPT-2's `Conv1D`) named in the
configuration become `QuantizedLinear`, which computes from packed codes and sparse outliers.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantease.export.nn import QuantizedLinear

METHOD = "quantease"


@register_quantization_config(METHOD)
class QuantEaseConfig(QuantizationConfigMixin):
    """The `quantization_config` of a native checkpoint.

    Args:
        bits: Bits per code.
        group_size: Consecutive inputs that share a scale; -1 for one scale per row.
        layers: Number of outliers of every quantized layer, by its name in the model.
        layer_bits: Bits of the layers that have others.
        kwargs: What transformers adds.
    """

    def __init__(
        self,
        bits: int = 3,
        group_size: int = -1,
        layers: dict[str, int] | None = None,
        layer_bits: dict[str, int] | None = None,
        **kwargs: Any,
    ):
        del kwargs
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers types its own methods only
        if not isinstance(layers, dict | None) or any(not isinstance(n, int) for n in (layers or {}).values()):
            raise ValueError("quantization_config: expected `layers` with the number of outliers of every layer")
        if not isinstance(layer_bits, dict | None) or any(not isinstance(n, int) for n in (layer_bits or {}).values()):
            raise ValueError("quantization_config: expected `layer_bits` with the bits of layers")
        self.bits, self.group_size, self.layers = bits, group_size, dict(layers or {})
        self.layer_bits = dict(layer_bits or {})


@register_quantizer(METHOD)
class QuantEaseHfQuantizer(HfQuantizer):
    """Puts `QuantizedLinear` modules where a native checkpoint has quantized layers; loads, never quantizes."""

    requires_calibration = True
    quantization_config: QuantEaseConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        config = self.quantization_config
        for name, outliers in config.layers.items():
            old: Any = dict(model.named_modules()).get(name)
            if not isinstance(old, nn.Linear) and type(old).__name__ != "Conv1D":
                raise ValueError(f"quantization_config: expected the names of linear layers, got {name!r}")
            features, out = (old.in_features, old.out_features) if isinstance(old, nn.Linear) else old.weight.shape
            with torch.device("meta"):
                new: Any = QuantizedLinear(
                    features,
                    out,
                    config.layer_bits.get(name, config.bits),
                    group_size=config.group_size,
                    outliers=outliers,
                    bias=old.bias is not None,
                    dtype=old.weight.dtype,
                )
            model.set_submodule(name, new.requires_grad_(False))
            new._is_hf_initialized = True
            parts = name.split(".")
            for length in range(len(parts)):
                # what holds it has nothing left for transformers to initialize, unless it has buffers that no
                # checkpoint holds (CodeGen's positions)
                holder = model.get_submodule(".".join(parts[:length]))
                if not holder._buffers:
                    holder._is_hf_initialized = True
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                module.check_weights(name)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` of a loaded model works.

        Args:
            args: Ignored.
            kwargs: Ignored.

        Returns:
            True.
        """
        del args, kwargs
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes are not trained."""
        return False
