"""Trainers, networks, checkpoints and run folders."""
