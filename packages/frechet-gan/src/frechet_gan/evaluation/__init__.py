"""Judging a generator."""
