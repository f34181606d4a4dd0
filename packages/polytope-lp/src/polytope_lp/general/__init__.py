"""Linear programs with any matrix over blocks of any polytope."""
