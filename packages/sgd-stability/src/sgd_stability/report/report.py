"""What `analyze` found, and the questions it answers: thresholds, verdicts, safe rates and batch sizes, culprits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from core_tensor.checks import check_choice, check_number
from torch import Tensor

from sgd_stability.report.maps import StabilityMap, stability_map
from sgd_stability.report.threshold import Culprit, Threshold, Verdict
from sgd_stability.theory.almost_sure import almost_sure_threshold
from sgd_stability.theory.bounds import Bound, all_bounds, momentum_stability
from sgd_stability.theory.dynamics import Update, noise_gain, update_threshold
from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.nested import Nested
from sgd_stability.theory.sampling import Sampling, Scheme, powers_of_two


@dataclass(frozen=True)
class StabilityReport:
    """Curvature of every analysed sample, and what follows for training.

    Attributes:
        family: The per-sample Hessians, reduced.
        n: Size of the whole data set.
        ids: Positions of the analysed samples, shape (n',).
        targets: Their targets, shape (n', ...).
        sampling: Minibatch scheme.
        update: Update rule of the optimizer.
        curvature: `"ggn"` or `"hessian"`.
        method: `"gram"`, `"jacobian"` or `"truncated"`.
        mean_loss: Mean loss of the analysed samples.
        gradient_rms: Root mean square of ||grad l_i||, zero at an interpolating minimum.
        relative_residual: How far the outputs are from where every loss is least, by a Newton step, relative to their
            size: rms ||dl/dz|| / (rms (tr Lambda / O) rms ||z||). Cross-entropy never gets there at finite weights.
        interpolating: Whether `relative_residual` is below the tolerance. The theory is exact only there; elsewhere
            thresholds describe the quadratic model around a point that SGD does not rest at.
        trace: Trace of H, also where the family is truncated; NaN if not computed.
        spectrum_converged: Whether the eigenvectors behind a truncated family met their tolerance.
        derivatives: How the outputs were differentiated: `"backward"` where only gradients were needed, else
            `"forward mode"`, or its replacement where the model has none (`"double backward"`, `"finite differences"`).
    """

    family: CurvatureFamily
    n: int
    ids: Tensor
    targets: Tensor
    sampling: Scheme
    update: Update
    curvature: str
    method: str
    mean_loss: float
    gradient_rms: float
    relative_residual: float
    interpolating: bool
    trace: float
    spectrum_converged: bool = True
    derivatives: str = "backward"
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def complete(self) -> bool:
        """Whether the whole data set was analysed."""
        return len(self.ids) == self.n

    @property
    def lambda_max(self) -> float:
        """Sharpness lambda1(H)."""
        return self.family.lambda_max

    @property
    def max_sample_curvature(self) -> float:
        """L = max_i lambda1(H_i); an underestimate on a subsample."""
        return self.family.max_sample_curvature

    @property
    def coherence(self) -> float:
        """The paper's sigma, of the analysed samples; NaN where H_i are indefinite or truncated."""
        return math.nan if self.family.truncated or self.family.signs is not None else self.family.coherence

    @property
    def coherence_matrix(self) -> Tensor:
        """S_ij = ||H_i^(1/2) H_j^(1/2)||_F, shape (n', n').

        Raises:
            ValueError: If the analysis was truncated or the H_i are indefinite.
        """
        if self.family.truncated:
            raise ValueError(
                "coherence_matrix: expected an analysis by method='gram' or 'jacobian', got a truncated one"
            )
        return self.family.coherence_matrix

    @property
    def meaning(self) -> str:
        """What the thresholds mean at this point, and what to do with them, in a sentence."""
        if self.interpolating:
            return "thresholds are those of SGD at this minimum: stay below them"
        return (
            "SGD does not rest at this point, so thresholds describe the quadratic model around it: rates below "
            "`lower` are safe here, and above it watch the loss (StabilityMonitor) or let `advise` choose"
        )

    def culprits(self, count: int = 5) -> list[Culprit]:
        """The samples with the largest curvature: they cap the learning rate.

        Args:
            count: How many.

        Returns:
            The samples, most curved first.
        """
        check_number("count", count, low=1, integer=True)
        values, where = self.family.sample_curvature.topk(min(count, self.family.n))
        base = max(self.lambda_max, 1e-300)
        return [
            Culprit(int(self.ids[i]), float(v), float(v) / base) for v, i in zip(values, where.tolist(), strict=True)
        ]

    def lr_threshold(self, batch_size: int, kind: Literal["mean_square", "almost_sure"] = "mean_square") -> Threshold:
        """The largest stable learning rate.

        Args:
            batch_size: B, from 1 to the size of the data set.
            kind: `"mean_square"` (exact, with bounds) or `"almost_sure"` (simulated: typical paths decay below it;
                for plain SGD on a complete, untruncated analysis).

        Returns:
            The threshold with its certified band.

        Raises:
            ValueError: If the arguments do not fit, or `almost_sure` is asked of a subsample or another update rule.
        """
        check_choice("kind", kind, ("mean_square", "almost_sure"))
        key = (kind, batch_size)
        if key not in self._cache:
            sampling = Sampling(self.n, batch_size, self.sampling)
            self._cache[key] = self._mean_square(sampling) if kind == "mean_square" else self._almost_sure(sampling)
        found: Threshold = self._cache[key]
        return found

    def _mean_square(self, sampling: Sampling) -> Threshold:
        found = self._nested.solve(lambda family: update_threshold(family, sampling, self.update))
        star, complete, converged = found.value, self.complete, found.converged
        bounds: tuple[Bound, ...] = ()
        if self.update.plain and self.family.signs is None:
            bounds = all_bounds(self.family, sampling)
        truncated = self.family.truncated
        lower = max((b.lr for b in bounds if b.side == "stable_below"), default=0.0)
        upper = min((b.lr for b in bounds if b.side == "unstable_above"), default=math.inf)
        paper = next((b.lr for b in bounds if b.name == "paper_theorem1"), math.nan)
        if truncated:
            lower = max(lower, self._stable_below(sampling))
            return Threshold(math.nan, lower, min(upper, star), math.nan, bounds, complete, converged)
        ends = (lower, upper) if bounds else (star, star)
        return Threshold(star, *ends, paper, bounds, complete, converged)

    @property
    def _nested(self) -> Nested:
        found: Nested = self._cache.setdefault("nested", Nested(self.family))
        return found

    def _stable_below(self, sampling: Sampling) -> float:
        # The stability bound that two numbers give, for momentum too: needs lambda1 and L of the whole spectrum.
        if self.family.signs is not None:
            return 0.0
        return momentum_stability(self.lambda_max, self.max_sample_curvature, sampling, self.update).lr

    def _almost_sure(self, sampling: Sampling) -> Threshold:
        if not self.complete or not self.update.plain or self.family.truncated:
            raise ValueError("kind: expected 'mean_square' for subsamples, truncated spectra and other rules than SGD")
        rate = almost_sure_threshold(self.family, sampling)
        return Threshold(rate, self.lr_threshold(sampling.batch_size).exact, math.inf, math.nan, (), self.complete)

    def verdict(self, lr: float, batch_size: int) -> Verdict:
        """Is training at this rate and batch size linearly stable?

        Args:
            lr: Learning rate.
            batch_size: Batch size.

        Returns:
            The verdict, its margin and what decided it: a cheap bound if one does, else the exact threshold.

        Raises:
            ValueError: If the learning rate is not positive.
        """
        check_number("lr", lr, low=0, open_low=True)
        threshold = self.lr_threshold(batch_size)
        margin = lr / float(threshold) if float(threshold) > 0 else math.inf
        for bound in threshold.bounds:
            if bound.side == "stable_below" and lr < bound.lr:
                return Verdict("stable", margin, bound.name, self.complete)
            if bound.side == "unstable_above" and lr > bound.lr:
                return Verdict("unstable", margin, bound.name, self.complete)
        if not math.isnan(threshold.exact):
            return Verdict("stable" if lr < threshold.exact else "unstable", margin, "exact", self.complete)
        if lr > threshold.upper:
            return Verdict("unstable", margin, "truncated", self.complete)
        return Verdict("stable" if lr < threshold.lower else "undecided", margin, "curvature", self.complete)

    def max_lr(self, batch_sizes: Iterable[int]) -> dict[int, float]:
        """The largest stable learning rate for every batch size.

        Args:
            batch_sizes: Batch sizes.

        Returns:
            Threshold by batch size (the certified upper bound where the analysis is truncated).
        """
        return {batch_size: float(self.lr_threshold(batch_size)) for batch_size in batch_sizes}

    def min_batch_size(self, lr: float) -> int | None:
        """The smallest batch size at which a learning rate is stable.

        The gain of the noise is proportional to the scheme's s, so one eigenvalue at B = 1 settles every B.

        Args:
            lr: Learning rate.

        Returns:
            The batch size, or None if even the full batch is unstable; of a truncated analysis a lower estimate.

        Raises:
            ValueError: If the learning rate is not positive, or the family is indefinite.
        """
        check_number("lr", lr, low=0, open_low=True)
        if self.family.signs is not None:
            raise ValueError("min_batch_size: expected positive semidefinite per-sample Hessians, got indefinite ones")
        if lr >= self.update.edge(self.lambda_max):
            # Draws with replacement stay noisy at B = n, and the mean dynamics itself is unstable.
            return None
        single = Sampling(self.n, 1, self.sampling)
        if len(self.family.h) == 0 or single.s == 0.0:
            return 1
        gain = self._nested.solve(lambda family: noise_gain(family, lr, single, self.update)[0]).value
        low, high = 0, self.n  # the answer lies in (low, high] if high is stable
        if Sampling(self.n, self.n, self.sampling).s * gain >= single.s:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            stable = Sampling(self.n, middle, self.sampling).s * gain < single.s
            low, high = (low, middle) if stable else (middle, high)
        return high

    def stability_map(
        self, lrs: Iterable[float] | None = None, batch_sizes: Iterable[int] | None = None
    ) -> StabilityMap:
        """Growth rates over a grid of learning rates and batch sizes, with the boundary curves.

        Args:
            lrs: Learning rates; if absent, 28 around the thresholds.
            batch_sizes: Batch sizes; if absent, the powers of two up to n, and n.

        Returns:
            The map; `plot(path)` draws it.
        """
        batches = powers_of_two(self.n) if batch_sizes is None else batch_sizes
        thresholds = {batch_size: self.lr_threshold(batch_size) for batch_size in batches}
        curves = {
            "exact": [t.exact for t in thresholds.values()],
            "stable below": [t.lower for t in thresholds.values()],
            "unstable above": [t.upper for t in thresholds.values()],
            "paper's Theorem 1": [t.paper for t in thresholds.values()],
        }
        if lrs is None:
            around = [rate for rate in map(float, thresholds.values()) if 0 < rate < math.inf] or [1.0]
            lrs = np.geomspace(min(around) / 3, max(around) * 2, 28).tolist()
        # cells on the directions that the curves needed: on fewer they would contradict them
        family = self._nested.finest
        return stability_map(family, self.n, list(lrs), list(thresholds), self.sampling, self.update, curves)

    def to_dict(self, batch_sizes: Iterable[int] = (1, 4, 16, 64)) -> dict[str, Any]:
        """The report as JSON-ready values (NaN and infinities become None).

        Args:
            batch_sizes: Batch sizes to report thresholds for; those above n are left out.

        Returns:
            The values.
        """
        thresholds = {B: self.lr_threshold(B) for B in batch_sizes if self.n >= B}
        return {
            "n": self.n,
            "analysed": len(self.ids),
            "curvature": self.curvature,
            "method": self.method,
            "derivatives": self.derivatives,
            "sampling": self.sampling,
            "mean_loss": self.mean_loss,
            "gradient_rms": finite(self.gradient_rms),
            "interpolating": self.interpolating,
            "meaning": self.meaning,
            "lambda_max": self.lambda_max,
            "trace": finite(self.trace),
            "max_sample_curvature": self.max_sample_curvature,
            "coherence": finite(self.coherence),
            "culprits": [vars(c) for c in self.culprits()],
            "thresholds": {
                str(B): {name: finite(getattr(t, name)) for name in ("exact", "lower", "upper", "paper")}
                for B, t in thresholds.items()
            },
        }

    def __str__(self) -> str:
        part = "all samples" if self.complete else f"{len(self.ids)} of {self.n} samples (estimates)"
        point = "interpolating minimum" if self.interpolating else "not an interpolating minimum"
        worst = ", ".join(f"#{c.id} ({c.relative:.1f}x)" for c in self.culprits(3))
        stand_in = "" if self.derivatives in {"backward", "forward mode"} else f"; derivatives by {self.derivatives}"
        doubt = "" if self.spectrum_converged else "; the top eigenvectors did not converge"
        return (
            f"{self.curvature} of {part} by {self.method}; {point} (relative residual {self.relative_residual:.1e})"
            f"{doubt}{stand_in}\n"
            f"lambda1 {self.lambda_max:.4g} | trace {self.trace:.4g} | L {self.max_sample_curvature:.4g} | "
            f"sigma {self.coherence:.4g}\nmost curved samples: {worst}"
            + ("" if self.interpolating else f"\n{self.meaning}")
        )


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity.

    Args:
        value: A number.

    Returns:
        The number, or None if it is not finite.
    """
    return value if math.isfinite(value) else None
