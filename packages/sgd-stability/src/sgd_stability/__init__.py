"""Linear stability of SGD from the geometry of the loss: exact thresholds, coherence, a live monitor."""

from typing import TYPE_CHECKING

from core_tensor.app.exports import lazy

if TYPE_CHECKING:
    from sgd_stability.monitor.advice import Advice, advise
    from sgd_stability.monitor.monitor import InstabilityWarning, MonitorWarning, StabilityMonitor
    from sgd_stability.monitor.scheduler import StabilityScheduler
    from sgd_stability.quadratic import quadratic as quadratic
    from sgd_stability.report.analysis import analyze
    from sgd_stability.report.check import Check
    from sgd_stability.report.maps import StabilityMap
    from sgd_stability.report.report import StabilityReport
    from sgd_stability.report.threshold import Culprit, Threshold, Verdict
    from sgd_stability.theory.almost_sure import LyapunovExponent, almost_sure_threshold, lyapunov_exponent
    from sgd_stability.theory.bounds import Bound, all_bounds
    from sgd_stability.theory.dynamics import SGD, Update, update_threshold
    from sgd_stability.theory.family import CurvatureFamily
    from sgd_stability.theory.sampling import SCHEMES, Sampling
    from sgd_stability.theory.second_moment import Extreme, lr_threshold, second_moment_radius

__all__ = [
    "SCHEMES",
    "SGD",
    "Advice",
    "Bound",
    "Check",
    "Culprit",
    "CurvatureFamily",
    "Extreme",
    "InstabilityWarning",
    "LyapunovExponent",
    "MonitorWarning",
    "Sampling",
    "StabilityMap",
    "StabilityMonitor",
    "StabilityReport",
    "StabilityScheduler",
    "Threshold",
    "Update",
    "Verdict",
    "advise",
    "all_bounds",
    "almost_sure_threshold",
    "analyze",
    "lr_threshold",
    "lyapunov_exponent",
    "quadratic",
    "second_moment_radius",
    "update_threshold",
]

__getattr__, __dir__, _ = lazy(__name__)
