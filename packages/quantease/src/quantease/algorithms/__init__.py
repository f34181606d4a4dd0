"""Algorithms that quantize one layer: rounding, GPTQ, coordinate descent, outliers."""
