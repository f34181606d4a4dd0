"""What a monitor's check finds, and the verdict that follows from a handful of curvatures."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from sgd_stability.report.optimizers import OptimizerState
from sgd_stability.theory.bounds import momentum_stability
from sgd_stability.theory.dynamics import Update, update_threshold
from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.sampling import Sampling

State = Literal["stable", "unstable", "undecided"]


@dataclass(frozen=True)
class Check:
    """One tier-2 check.

    Attributes:
        step: Optimizer step.
        lr: Learning rate.
        batch_size: Batch size.
        lambda1: Sharpness of the probe along the tracked eigenvector: a lower estimate.
        residual: ||H v - lambda1 v|| / lambda1 of the half just measured.
        edge: Sharpness at which full-batch training becomes unstable at this rate.
        max_sample_curvature: L over the suspects.
        lower: Every rate below is stable (estimate); 0 where no bound is known.
        upper: Every rate above is unstable (estimate).
        exact: Threshold by the full analysis, where it was asked to settle the check; otherwise NaN.
        state: `"stable"`, `"unstable"` or `"undecided"`.
        culprits: Ids of the most curved samples, most curved first.
        safe_batch_size: Smallest batch size at which this rate is below `lower`; None if there is none.
        seconds: What the check cost.
    """

    step: int
    lr: float
    batch_size: int
    lambda1: float
    residual: float
    edge: float
    max_sample_curvature: float
    lower: float
    upper: float
    exact: float
    state: State
    culprits: list[int]
    safe_batch_size: int | None
    seconds: float

    @property
    def margin(self) -> float:
        """Learning rate over the threshold: the exact one if known, else the upper end of the band."""
        threshold = self.upper if math.isnan(self.exact) else self.exact
        return self.lr / threshold if threshold > 0 else math.inf

    @property
    def safe_lr(self) -> float:
        """The largest rate known to be stable: the exact threshold, else the lower end of the band."""
        return self.lower if math.isnan(self.exact) else self.exact

    def to_dict(self) -> dict[str, Any]:
        """The check as JSON-ready values.

        Returns:
            Values by name; None for what is not finite.
        """
        entries = asdict(self).items()
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entries}

    def __str__(self) -> str:
        exact = "" if math.isnan(self.exact) else f", exact {self.exact:.3g}"
        verdict = self.state.upper() + (f" x{self.margin:.2f}" if self.state == "unstable" else "")
        return (
            f"step {self.step} lr {self.lr:.3g} B {self.batch_size} | lambda1 {self.lambda1:.3g} (edge {self.edge:.3g})"
            f" | eta* in [{self.lower:.3g}, {self.upper:.3g}]{exact} | {verdict} | largest safe lr {self.safe_lr:.3g}, "
            f"smallest safe B {self.safe_batch_size or '-'} | culprits {', '.join(f'#{i}' for i in self.culprits[:3])}"
        )


@dataclass(frozen=True)
class Band:
    """Two ends between which the threshold lies.

    Attributes:
        lower: Every rate below is stable.
        upper: Every rate above is unstable.
    """

    lower: float
    upper: float

    def state(self, lr: float) -> State:
        """What the band says about a learning rate.

        Args:
            lr: Learning rate.

        Returns:
            The state.
        """
        if lr > self.upper:
            return "unstable"
        return "stable" if lr < self.lower else "undecided"


def band(forms: Tensor, L: float, sampling: Sampling, update: Update) -> Band:
    """The band that one direction and the largest sample curvature give.

    Args:
        forms: v'H_i v of a unit vector, shape (n,).
        L: max_i lambda1(H_i).
        sampling: Minibatch scheme.
        update: Update rule.

    Returns:
        Stable below the bound of lambda1 = v'Hv and L; unstable above the exact threshold of the family compressed
        to v.
    """
    factors = forms.double().clamp_min(0).sqrt()[:, None, None]
    upper = update_threshold(CurvatureFamily.from_factors(factors), sampling, update).value
    return Band(min(momentum_stability(float(forms.mean()), L, sampling, update).lr, upper), upper)


def safe_batch_size(lambda1: float, L: float, state: OptimizerState, sampling: Sampling) -> int | None:
    """The smallest batch size at which the bound of lambda1 and L calls the optimizer's rate stable.

    Args:
        lambda1: Sharpness.
        L: max_i lambda1(H_i).
        state: Learning rate and update rule.
        sampling: Data set and scheme; its batch size does not matter.

    Returns:
        The batch size; None if the whole data set is not enough.
    """

    def safe(B: int) -> bool:
        return state.lr < momentum_stability(lambda1, L, Sampling(sampling.n, B, sampling.scheme), state.update).lr

    if not safe(sampling.n):
        return None
    low, high = 0, sampling.n  # the answer lies in (low, high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if safe(middle) else (middle, high)
    return high
