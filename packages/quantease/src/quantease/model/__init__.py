"""Whole models: blocks loaded one at a time, calibration, the resumable run and its files."""
