"""Formats in which a quantized model is saved, each loaded again before it counts as saved."""
