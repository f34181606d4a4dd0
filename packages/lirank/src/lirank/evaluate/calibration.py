"""Calibration from recent labels: a shift, a line or an isotonic curve of the logit, by the number of positives."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from core_tensor.checks import check_choice

METHODS = ("auto", "shift", "platt", "isotonic")
_SHIFT, _LINE = 50, 500
"""Fewest positives (and negatives) for a line, and for an isotonic curve."""
_LEAST_SLOPE = 1e-3
"""Of a curve, so that different logits keep their order: flat steps would make ties and change the AUC."""


@dataclass(frozen=True)
class Curve:
    """A monotone map of logits, linear between its points.

    Attributes:
        logits: Where, ascending, shape (n,).
        values: Calibrated logits there, ascending, shape (n,).
        method: `shift`, `platt` or `isotonic`.
    """

    logits: np.ndarray
    values: np.ndarray
    method: str

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated logits; beyond the ends the curve continues with slope 1, and NaN stays NaN."""
        inside: np.ndarray = np.interp(logits, self.logits, self.values)
        inside += np.minimum(logits - self.logits[0], 0) + np.maximum(logits - self.logits[-1], 0)
        return inside


def fit_curve(
    logits: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    method: Literal["auto", "shift", "platt", "isotonic"] = "auto",
    low: float = -12.0,
    high: float = 8.0,
    present: Curve | None = None,
) -> Curve:
    """Fit a calibration curve to labels.

    Args:
        logits: Uncalibrated logits, shape (n,), finite.
        labels: 0 or 1, shape (n,).
        weights: Row weights, shape (n,).
        method: `auto` shifts with fewer than 50 positives or negatives, fits a line with fewer than 500, and an
            isotonic curve (PAVA) otherwise.
        low: Lower end of the curve.
        high: Upper end of the curve.
        present: The calibration in use, which a shift keeps and only moves: a few clicks say how often, not whether
            the model's scores are too far apart. None for the identity.

    Returns:
        The curve on [low, high].

    Raises:
        ValueError: If the labels are all the same or a logit is not finite.
    """
    check_choice("method", method, METHODS)
    if not np.isfinite(logits).all():
        raise ValueError(f"logits: expected finite values, got {int((~np.isfinite(logits)).sum())} NaN or infinite")
    w = np.ones(len(logits)) if weights is None else weights
    rare = min(labels.sum(), (1 - labels).sum())
    if rare == 0:
        raise ValueError("labels: expected both classes to calibrate on, got one")
    if method == "auto":
        method = "shift" if rare < _SHIFT else "platt" if rare < _LINE else "isotonic"
    if method == "isotonic":
        return _isotonic_curve(logits, labels, w, low, high)
    if method == "shift" and present is not None:
        _, shift = _line(present(logits), labels, w, slope=False)
        return Curve(present.logits, present.values + shift, method)
    slope, shift = _line(logits, labels, w, slope=method == "platt")
    ends = np.array([low, high])
    return Curve(ends, slope * ends + shift, method)


def _line(z: np.ndarray, y: np.ndarray, w: np.ndarray, *, slope: bool) -> tuple[float, float]:
    """Maximum likelihood of sigmoid(a z + b) by Newton steps with halving; a is 1 unless `slope`."""
    a, b = 1.0, 0.0
    for _ in range(100):
        p = _sigmoid(a * z + b)
        r, h = w * (p - y), w * p * (1 - p) + 1e-12
        if slope:
            H = np.array([[(h * z * z).sum() + 1e-9, (h * z).sum()], [(h * z).sum(), h.sum()]])
            step = np.linalg.solve(H, np.array([(r * z).sum(), r.sum()]))
        else:
            step = np.array([0.0, r.sum() / h.sum()])
        size, before = 1.0, _nll(a * z + b, y, w)
        while _nll((a - size * step[0]) * z + b - size * step[1], y, w) > before + 1e-12 and size > 1e-6:
            size /= 2
        a, b = a - size * step[0], b - size * step[1]
        if np.abs(step).max() < 1e-10:
            break
    return max(a, _LEAST_SLOPE), b


def _isotonic_curve(z: np.ndarray, y: np.ndarray, w: np.ndarray, low: float, high: float) -> Curve:
    rate = float((w * y).sum() / w.sum())
    x, p, mass = pava(np.clip(z, low, high), y, w)
    # a block of one class would have an infinite logit: half a row at the base rate is added to each
    p = (p * mass + 0.5 * rate) / (mass + 0.5)
    p = np.maximum.accumulate(p)
    grid = np.linspace(low, high, 201)
    values = np.interp(grid, x, np.log(p) - np.log1p(-p))
    values = np.maximum.accumulate(values - _LEAST_SLOPE * grid) + _LEAST_SLOPE * grid
    return Curve(grid, values, "isotonic")


def pava(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Isotonic regression by pooling adjacent violators; equal x are pooled first.

    Args:
        x: Where, shape (n,).
        y: Values, shape (n,).
        w: Weights, shape (n,), positive.

    Returns:
        Mean x, value and weight of every block, in ascending order.
    """
    order = np.argsort(x, kind="stable")
    unique, start = np.unique(x[order], return_index=True)
    weight = np.add.reduceat(w[order], start)
    total = np.add.reduceat((w * y)[order], start)
    blocks: list[tuple[float, float, float]] = []  # weight, sum of y, sum of x
    for m, s, at in zip(weight.tolist(), total.tolist(), (unique * weight).tolist(), strict=True):
        block = (m, s, at)
        while blocks and blocks[-1][1] * block[0] >= block[1] * blocks[-1][0]:
            last = blocks.pop()
            block = (last[0] + block[0], last[1] + block[1], last[2] + block[2])
        blocks.append(block)
    found = np.array(blocks).T
    return found[2] / found[0], found[1] / found[0], found[0]


def _sigmoid(z: np.ndarray) -> np.ndarray:
    found: np.ndarray = 0.5 * (1 + np.tanh(0.5 * z))
    return found


def _nll(z: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    return float((w * (np.logaddexp(0, z) - y * z)).sum())
