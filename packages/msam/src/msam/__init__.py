"""mSAM: micro-batch-averaged sharpness-aware minimization, exact and cheaper than SAM."""
