"""Linear stability of SGD from the geometry of the loss: exact thresholds, coherence, a live monitor."""

from sgd_stability import quadratic
from sgd_stability.almost_sure import LyapunovExponent, almost_sure_threshold, lyapunov_exponent
from sgd_stability.analysis import analyze
from sgd_stability.bounds import Bound, all_bounds
from sgd_stability.check import Check
from sgd_stability.dynamics import SGD, Update, update_threshold
from sgd_stability.family import CurvatureFamily
from sgd_stability.maps import StabilityMap
from sgd_stability.monitor import InstabilityWarning, StabilityMonitor
from sgd_stability.report import StabilityReport
from sgd_stability.sampling import SCHEMES, Sampling
from sgd_stability.second_moment import Extreme, lr_threshold, second_moment_radius
from sgd_stability.threshold import Culprit, Threshold, Verdict

__all__ = [
    "SCHEMES",
    "SGD",
    "Bound",
    "Check",
    "Culprit",
    "CurvatureFamily",
    "Extreme",
    "InstabilityWarning",
    "LyapunovExponent",
    "Sampling",
    "StabilityMap",
    "StabilityMonitor",
    "StabilityReport",
    "Threshold",
    "Update",
    "Verdict",
    "all_bounds",
    "almost_sure_threshold",
    "analyze",
    "lr_threshold",
    "lyapunov_exponent",
    "quadratic",
    "second_moment_radius",
    "update_threshold",
]
