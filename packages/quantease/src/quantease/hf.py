"""`import quantease.hf` teaches transformers to load the native format; the work is in `quantease.export.hf`."""

from quantease.export.hf import METHOD, QuantEaseConfig, QuantEaseHfQuantizer

__all__ = ["METHOD", "QuantEaseConfig", "QuantEaseHfQuantizer"]
