"""Training: the loop, row-wise optimizers, exact checkpoints, incremental training."""
