"""Serving: compression, export with checks, and an HTTP scorer that agrees with training."""
