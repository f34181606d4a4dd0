"""QuantEase: LLM post-training quantization by coordinate descent, outlier-aware."""

from quantease.causal_lm import CausalLM, open_causal_lm
from quantease.config import ALGORITHMS, LayerConfig
from quantease.export import export_model
from quantease.gram import GramFolds, Shrinkage
from quantease.layer import LayerReport, Outliers, QuantizedLayer
from quantease.objective import relative_error
from quantease.perplexity import perplexity
from quantease.quantize import quantize_layer
from quantease.quantize_model import ModelConfig, QuantizedCausalLM, quantize_model

__all__ = [
    "ALGORITHMS",
    "CausalLM",
    "GramFolds",
    "LayerConfig",
    "LayerReport",
    "ModelConfig",
    "Outliers",
    "QuantizedCausalLM",
    "QuantizedLayer",
    "Shrinkage",
    "export_model",
    "open_causal_lm",
    "perplexity",
    "quantize_layer",
    "quantize_model",
    "relative_error",
]
