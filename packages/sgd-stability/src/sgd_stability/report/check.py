"""What a monitor's check finds, and the state that follows from a handful of curvatures and the loss."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sgd_stability.report.optimizers import OptimizerState
from sgd_stability.theory.bounds import curvature_stability, momentum_stability, noise_limit, stable_below
from sgd_stability.theory.dynamics import Update
from sgd_stability.theory.sampling import Sampling

State = Literal["stable", "caution", "unstable", "diverged"]
ADVICE = {
    "stable": "nothing to do",
    "caution": "the rate is above what is known to be safe; watch the loss, or lower it to {safe:.3g} if that rises",
    "unstable": "lower the rate to {safe:.3g}, or raise the batch size to {batch}",
    "diverged": "the run is lost: go back to a checkpoint, and start with a warmup to a rate below its last safe one",
}


@dataclass(frozen=True)
class Check:
    """One tier-2 check.

    Attributes:
        step: Optimizer step.
        lr: Learning rate.
        batch_size: Batch size.
        loss: Mean loss of the probe, as last measured.
        average_loss: Exponential average of it over the checks.
        lambda1: Sharpness of the probe along the tracked eigenvector: a lower estimate.
        residual: ||H v - lambda1 v|| / lambda1 of the half just measured.
        edge: Sharpness at which full-batch training becomes unstable at this rate.
        max_sample_curvature: L over the suspects.
        lower: Every rate below is stable (estimate).
        upper: Every rate above is unstable (estimate).
        exact: Threshold by the full analysis, where it was asked to settle the check; otherwise NaN.
        state: `"stable"` below `lower`; `"caution"` above it; `"unstable"` above `upper` while the loss does not fall,
            or above `lower` while it is a quarter above its best; `"diverged"` if something is not finite, or the loss
            is back where it started, or far above without curvature.
        culprits: Ids of the most curved samples, most curved first.
        safe_batch_size: Smallest batch size at which this rate is below `lower`; None if there is none.
        seconds: What the check cost.
    """

    step: int
    lr: float
    batch_size: int
    loss: float
    average_loss: float
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

    @property
    def advice(self) -> str:
        """What to do, in a sentence."""
        return ADVICE[self.state].format(safe=self.safe_lr, batch=self.safe_batch_size or "the whole dataset")

    def to_dict(self) -> dict[str, Any]:
        """The check as JSON-ready values.

        Returns:
            Values by name; None for what is not finite.
        """
        entries = asdict(self).items()
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entries}

    def __str__(self) -> str:
        if self.state == "diverged" and math.isnan(self.lambda1):
            return f"step {self.step} lr {self.lr:.3g} B {self.batch_size} | not finite | DIVERGED"
        exact = "" if math.isnan(self.exact) else f", exact {self.exact:.3g}"
        verdict = self.state.upper() + (f" x{self.margin:.2f}" if self.state == "unstable" else "")
        return (
            f"step {self.step} lr {self.lr:.3g} B {self.batch_size} | loss {self.average_loss:.3g} | "
            f"lambda1 {self.lambda1:.3g} (edge {self.edge:.3g}) | "
            f"eta* in [{self.lower:.3g}, {self.upper:.3g}]{exact} | {verdict} | largest safe lr {self.safe_lr:.3g}, "
            f"smallest safe B {self.safe_batch_size or '-'} | culprits {', '.join(f'#{i}' for i in self.culprits[:3])}"
        )


@dataclass(frozen=True)
class Band:
    """Two ends that bracket the threshold.

    Attributes:
        lower: Every rate below is stable.
        upper: Every rate above is unstable.
    """

    lower: float
    upper: float

    def holds(self, lr: float) -> bool:
        """Whether a learning rate is between the ends, undecided.

        Args:
            lr: Learning rate.

        Returns:
            True if it does.
        """
        return self.lower <= lr <= self.upper


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
    forms = forms.double().clamp_min(0)
    h = float(forms.mean())
    # of one direction M is a number: the noise is ((a - 1) h^2 + s mean (v'H_i v)^2) M
    noise = (sampling.a - 1) * h + sampling.s * float(forms.square().mean()) / h if h > 0 else 0.0
    upper = stable_below(torch.tensor([h], dtype=torch.float64), noise, update)
    return Band(min(momentum_stability(h, L, sampling, update).lr, upper), upper)


def safe_batch_size(lambda1: float, L: float, state: OptimizerState, sampling: Sampling) -> int | None:
    """The smallest batch size at which the bound of lambda1 and L calls the optimizer's rate stable.

    Args:
        lambda1: Sharpness.
        L: max_i lambda1(H_i).
        state: Learning rate and update rule.
        sampling: Dataset and scheme; its batch size does not matter.

    Returns:
        The batch size; None if the complete dataset is not enough.
    """
    limit = None if state.update.plain else noise_limit(lambda1, state.lr, state.update)

    def safe(B: int) -> bool:
        at = Sampling(sampling.n, B, sampling.scheme)
        return state.lr < curvature_stability(lambda1, L, at).lr if limit is None else at.s * L < limit

    if not safe(sampling.n):
        return None
    low, high = 0, sampling.n  # the answer lies in (low, high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if safe(middle) else (middle, high)
    return high


class LossRecord:
    """The probe's loss over the checks: is it finite, does it fall, is it back where it started?

    Args:
        start: Loss of the probe before training.
        chance: Loss of the best constant output, or NaN.
    """

    FORGET = 0.5
    """Weight of the newest loss in the average."""
    LEFT, BACK = 0.8, 0.95
    """Shares of the reference: training counts as under way below the first, and as back above the second."""
    RISEN, LEAST_RISE = 1.25, 0.02
    """The average has risen once it is above its least value by this factor, and by this share of the reference."""
    FAR = 3.0
    """Multiple of both the loss at the start and that of the best constant output above which it has no curvature left
    only where the run is lost."""
    FLAT = 0.01
    """Share of its largest spread below which the outputs count as constant: the network is dead."""

    def __init__(self, start: float, chance: float) -> None:
        self.start, self.chance = start, chance
        self.newest, self.average, self.least = math.nan, math.nan, math.inf
        self.spread, self.widest = math.nan, 0.0
        self.falls = False

    def add(self, loss: float, spread: float) -> None:
        """Take a measurement into the record.

        Args:
            loss: Mean loss of the probe.
            spread: How much the outputs differ between samples.
        """
        self.falls = loss < self.average
        self.newest, self.spread = loss, spread
        self.average = loss if math.isnan(self.average) else self.average + self.FORGET * (loss - self.average)
        self.least, self.widest = min(self.least, self.average), max(self.widest, spread)

    @property
    def reference(self) -> float:
        """The loss at the start or that of the best constant output, whichever is less; NaN if there is neither."""
        return min((v for v in (self.start, self.chance) if v > 0), default=math.nan)

    @property
    def risen(self) -> bool:
        """Whether the average is a quarter above its least value."""
        rise = self.average - self.least
        return self.average > self.RISEN * self.least and rise > self.LEAST_RISE * self.reference

    @property
    def lost(self) -> bool:
        """Whether the loss is not finite, or back at its start or at chance after having left or with flat outputs."""
        if not math.isfinite(self.newest):
            return True
        reference = self.reference
        if not self.newest >= self.BACK * reference:
            return False
        return self.least < self.LEFT * reference or self.spread < self.FLAT * self.widest

    @property
    def far(self) -> bool:
        """Whether the loss is far above both start and chance; not known to be where chance is unknown."""
        return self.newest > self.FAR * max(self.chance, self.start)  # NaN stays NaN

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs.

        Returns:
            Numbers by name.
        """
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: From `state_dict`.
        """
        for name in vars(self):
            setattr(self, name, type(getattr(self, name))(state[name]))


def state_of(lr: float, found: Band, exact: float, record: LossRecord) -> State:
    """One of the four states.

    Args:
        lr: Learning rate.
        found: Band of the threshold.
        exact: The threshold, or NaN.
        record: The loss so far.

    Returns:
        The state.
    """
    if record.lost or (record.far and found.lower == math.inf):
        return "diverged"
    if not math.isnan(exact):
        return "stable" if lr < exact else "unstable"
    if (lr > found.upper and not record.falls) or (lr > found.lower and record.risen):
        return "unstable"
    return "stable" if lr < found.lower else "caution"
