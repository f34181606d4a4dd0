"""Where a component helps and where it does not: a generator of logs with known truth, and ablations on it."""
