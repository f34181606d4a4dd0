"""Generators trained by Frechet distance or optimal transport in feature space."""
