"""Vectors and scores for requests: lookup, HTTP scorer, exported global block."""
