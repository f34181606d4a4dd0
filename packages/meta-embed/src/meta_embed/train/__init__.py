"""The outer loop: meta-training over episodes, early stopping, exact resume."""
