"""Metrics by activity, paired bootstrap, baselines, freshness."""
