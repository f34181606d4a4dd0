"""mSAM: micro-batch-averaged sharpness-aware minimization, exact and cheaper than SAM."""

from typing import TYPE_CHECKING

from core_tensor.app.exports import lazy

if TYPE_CHECKING:
    from msam.engines.ghost.errors import UnsupportedError
    from msam.optimizer.optim import MSAM, msam_step
    from msam.optimizer.telemetry import Check, Explanation
    from msam.step.batches import micro_batches
    from msam.step.functional import Aux, msam_grad
    from msam.step.options import Options, auto_rho
    from msam.step.record import StepRecord

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

__getattr__, __dir__, _ = lazy(__name__)
