"""Is the model still calibrated? Predictions against outcomes over the recent past."""

import math

import numpy as np


class DriftMonitor:
    """Compares predicted with observed positives, old rows fading.

    Args:
        memory: Rows after which a row counts 1/e.
        alarm: Standard deviations of the observed count at which the monitor raises an alarm.
    """

    def __init__(self, memory: float = 100_000, alarm: float = 5.0) -> None:
        self.memory, self.alarm = memory, alarm
        self._rows = self._predicted = self._observed = self._variance = 0.0

    def add(self, p: np.ndarray, labels: np.ndarray) -> None:
        """Add rows whose outcome is known.

        Args:
            p: Predicted probabilities, shape (n,).
            labels: Outcomes, shape (n,), NaN where unknown.
        """
        known = ~np.isnan(labels)
        p, y = p[known].astype(np.float64), labels[known]
        fade = math.exp(-len(p) / self.memory)
        self._rows = self._rows * fade + len(p)
        self._predicted = self._predicted * fade + float(p.sum())
        self._observed = self._observed * fade + float(y.sum())
        self._variance = self._variance * fade**2 + float((p * (1 - p)).sum())

    def report(self) -> dict[str, float | bool | None]:
        """Rows in memory, predicted and observed rate, their ratio, and whether it is time to recalibrate."""
        if self._rows == 0:
            return {"rows": 0.0, "predicted": None, "observed": None, "ratio": None, "alarm": False}
        gap = abs(self._predicted - self._observed)
        return {
            "rows": self._rows,
            "predicted": self._predicted / self._rows,
            "observed": self._observed / self._rows,
            "ratio": self._predicted / self._observed if self._observed else None,
            "alarm": gap > self.alarm * math.sqrt(self._variance + 1e-12),
        }
