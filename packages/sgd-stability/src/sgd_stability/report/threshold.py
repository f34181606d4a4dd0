"""Answers of a report: a threshold with its band, a verdict with its certificate, the samples behind them."""

import math
from dataclasses import dataclass
from typing import Literal

from sgd_stability.theory.bounds import Bound


@dataclass(frozen=True)
class Threshold:
    """The largest stable learning rate at one batch size.

    Attributes:
        exact: eta* of the analysed samples; NaN if only a truncated spectrum is known.
        lower: Every rate below is stable (largest stability bound, or eta* itself).
        upper: Every rate above is unstable (smallest instability bound, or eta* itself).
        paper: Theorem 1 of the paper, a condition for instability; NaN where coherence is unknown.
        bounds: Every bound behind these, with the side it certifies.
        certified: Whether the analysed samples are the whole data set; otherwise everything here is an estimate.
        converged: Whether Lanczos met its tolerance; otherwise `exact` is an upper estimate.
    """

    exact: float
    lower: float
    upper: float
    paper: float
    bounds: tuple[Bound, ...]
    certified: bool
    converged: bool = True

    def __float__(self) -> float:
        """The exact threshold, or the certified upper bound where only that is known.

        Returns:
            A learning rate.
        """
        return self.upper if math.isnan(self.exact) else self.exact

    def __str__(self) -> str:
        known = f"eta* in [{self.lower:.4g}, {self.upper:.4g}]"
        if not math.isnan(self.exact):
            paper = "" if math.isnan(self.paper) else f"; Theorem 1 {self.paper:.4g}"
            band = f"stable below {self.lower:.4g}, unstable above {self.upper:.4g}"
            known = f"eta* {self.exact:.4g} (bounds: {band}{paper})"
        return known + ("" if self.certified else ", an estimate from a subsample")


@dataclass(frozen=True)
class Verdict:
    """Whether training at one learning rate and batch size is linearly stable.

    Attributes:
        state: `"stable"`, `"unstable"`, or `"undecided"` between the bounds of a truncated analysis.
        margin: Learning rate over the threshold; above 1 is unstable.
        certificate: What decided it: the name of a bound, or `"exact"`.
        certified: Whether the whole data set was analysed.
    """

    state: Literal["stable", "unstable", "undecided"]
    margin: float
    certificate: str
    certified: bool

    def __str__(self) -> str:
        estimate = "" if self.certified else ", an estimate from a subsample"
        return f"{self.state}: learning rate {self.margin:.3g} times the threshold (by {self.certificate}{estimate})"


@dataclass(frozen=True)
class Culprit:
    """A sample and its share in the instability.

    Attributes:
        id: Position in the data set.
        curvature: lambda1(H_i).
        relative: lambda1(H_i) / lambda1(H).
    """

    id: int
    curvature: float
    relative: float
