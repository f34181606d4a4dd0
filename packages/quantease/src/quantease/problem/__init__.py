"""The problem of one layer: options, Gram matrices, grids, objective, and what a solution is."""
