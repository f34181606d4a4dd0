"""Linear stability of SGD from the geometry of the loss: exact thresholds, coherence, a live monitor."""
