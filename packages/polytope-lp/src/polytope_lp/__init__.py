"""Web-scale matching LPs: dual decomposition and projection onto any polytope."""
