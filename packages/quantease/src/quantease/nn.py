"""`QuantizedLinear`, a linear layer that computes from packed codes; it lives in `quantease.export.nn`."""

from quantease.export.nn import QuantizedLinear

__all__ = ["QuantizedLinear"]
