"""What an optimizer does next; the code is `sgd_stability.report.optimizers`."""

from sgd_stability.report.optimizers import OptimizerState, adam_preconditioner, read_optimizer

__all__ = ["OptimizerState", "adam_preconditioner", "read_optimizer"]
