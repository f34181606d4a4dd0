"""Data whose truth is known, its near-oracle, and what is measured on it."""
