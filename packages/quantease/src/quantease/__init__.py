"""QuantEase: LLM post-training quantization by coordinate descent, outlier-aware."""

from typing import TYPE_CHECKING

from core_tensor.app.exports import lazy

if TYPE_CHECKING:
    from quantease.algorithms.quantize import quantize_layer
    from quantease.choices import ALGORITHMS
    from quantease.evaluation.perplexity import perplexity
    from quantease.export.save import export_model
    from quantease.model.causal_lm import CausalLM, open_causal_lm
    from quantease.model.plan import ModelConfig
    from quantease.model.quantize_model import QuantizedCausalLM, quantize_model
    from quantease.problem.config import LayerConfig
    from quantease.problem.gram import GramFolds, Shrinkage
    from quantease.problem.layer import LayerReport, Outliers, QuantizedLayer
    from quantease.problem.objective import relative_error

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
__getattr__, __dir__, _ = lazy(__name__)
