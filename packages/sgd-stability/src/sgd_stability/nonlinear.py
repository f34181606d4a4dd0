"""Real SGD as the judge of the linear theory; the code is `sgd_stability.report.nonlinear`."""

from sgd_stability.report.nonlinear import LEAVES, LOSS_LEAVES, Trial, interpolate, run_sgd, verify

__all__ = ["LEAVES", "LOSS_LEAVES", "Trial", "interpolate", "run_sgd", "verify"]
