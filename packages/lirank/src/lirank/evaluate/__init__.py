"""Metrics, calibration measures, paired comparison and baselines."""
