"""What a command line may choose from; no torch here, so that `--help` starts at once."""

METHODS = ("auto", "lbfgs", "accelerated", "newton")
KINDS = ("uncorrelated", "tied", "counts", "pacing")
SOURCES_PER_BATCH = 1 << 15
"""Sources of one batch of a generated marketplace."""
