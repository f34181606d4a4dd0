"""Ways to compute mSAM's gradient, which all give the same one."""
