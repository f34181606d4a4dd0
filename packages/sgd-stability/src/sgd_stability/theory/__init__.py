"""Linear stability of a family of per-sample Hessians: exact thresholds, bounds, growth."""
