"""QuantEase: LLM post-training quantization by coordinate descent, outlier-aware."""

from quantease.config import ALGORITHMS, LayerConfig
from quantease.gram import GramFolds, Shrinkage
from quantease.layer import LayerReport, Outliers, QuantizedLayer
from quantease.objective import relative_error
from quantease.quantize import quantize_layer

__all__ = [
    "ALGORITHMS",
    "GramFolds",
    "LayerConfig",
    "LayerReport",
    "Outliers",
    "QuantizedLayer",
    "Shrinkage",
    "quantize_layer",
    "relative_error",
]
