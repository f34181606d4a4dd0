"""Per-sample curvature of a network: losses, Jacobians, Gram matrices, products, spectra."""
