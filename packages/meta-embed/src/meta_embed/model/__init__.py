"""Blocks, the global block, and models that turn supports into vectors and vectors into scores."""
