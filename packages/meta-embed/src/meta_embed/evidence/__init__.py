"""Data whose truth is known, its near-oracle, and readers of public logs."""
