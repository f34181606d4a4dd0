"""From a support to a vector: the MAP head and gradient steps (MAML)."""
