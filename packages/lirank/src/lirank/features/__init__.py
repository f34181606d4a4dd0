"""Causal features: history and popularity from strictly earlier events, by the same code in batch and online."""
