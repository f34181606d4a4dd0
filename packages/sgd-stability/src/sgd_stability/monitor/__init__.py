"""Stability while training."""
