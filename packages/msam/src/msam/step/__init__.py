"""What one step is made of: options, micro-batches, the perturbation, and what must hold around the two passes."""
