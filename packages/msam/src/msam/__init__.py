"""mSAM: micro-batch-averaged sharpness-aware minimization, exact and cheaper than SAM."""

from msam.batches import micro_batches
from msam.functional import Aux, msam_grad
from msam.ghost import UnsupportedError
from msam.optim import MSAM, msam_step
from msam.options import Options, auto_rho
from msam.record import StepRecord
from msam.telemetry import Check, Explanation

__all__ = [
    "MSAM",
    "Aux",
    "Check",
    "Explanation",
    "Options",
    "StepRecord",
    "UnsupportedError",
    "auto_rho",
    "micro_batches",
    "msam_grad",
    "msam_step",
]
