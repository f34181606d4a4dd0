"""What a user can choose about mSAM, checked once."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from core_tensor.checks import check_choice, check_number

RHO_SAM = 0.05
"""Neighbourhood radius that `rho="auto"` assumes for plain SAM (Foret et al., arXiv 2010.01412)."""

Rho = float | Literal["auto"] | Callable[[int], float]


@dataclass(frozen=True)
class Options:
    """Hyper-parameters of mSAM and the semantics of its two passes.

    Attributes:
        rho: Radius of the perturbation, `eps_j = rho g_j / ||g_j||`: a number >= 0, `"auto"` (see `auto_rho`), or a
            function of the number of steps done so far.
        num_micro_batches: Number m of disjoint micro-batches of one process's batch (exactly one of the two is given).
        micro_batch_size: Examples per micro-batch; the last one may be smaller.
        mode: `"ghost"` (exact, weights untouched), `"sequential"` (perturb and restore), `"vmap"` (all micro-batches
            at once with a copy of the weights each) or `"auto"`: ghost, or sequential where ghost does not apply or
            took longer in the first steps.
        ascent: `"full"`; `"half"` takes the ascent direction from half of each micro-batch; `"norm"` perturbs
            normalization layers only (arXiv 2306.04226); `"chained"` has a single pass: each slot (place in the
            batch) follows its gradient of the last step.
        adaptive: False, or the scaling T of ASAM (arXiv 2102.11600): `"element"` (also True), `"filter"`, `"layer"`.
        every: Perturb on each `every`-th step only; the steps between are plain, with a single pass.
        bn: Running statistics of batch norms move in the `"first"` pass only, in `"both"`, or are `"frozen"`. With
            `"both"` and several micro-batches the order of the updates, and so the running averages, depends on the
            mode: sequential does both passes of a micro-batch before the next one, ghost pass 1 of all, then pass 2.
            Other buffers move in the first pass only.
        rng: `"same"` repeats the dropout masks of pass 1 in pass 2, `"independent"` draws them anew.
        clip_norm: Largest norm of the averaged gradient in `step(loss_fn, batch)`, or None.
        shard_weight: Weight of a micro-batch, such as its number of valid tokens; None counts its examples.
        reduction: Whether the loss function returns the `"mean"` or the `"sum"` over its examples; the gradient is that
            of the same reduction over the batch.
        check_finite: Whether a loss or gradient that is NaN or infinite raises, for which the host reads the losses.
            Norms of gradients it reads in any case, once per step in ghost mode and per micro-batch in sequential.
    """

    rho: Rho = RHO_SAM
    num_micro_batches: int | None = None
    micro_batch_size: int | None = None
    mode: Literal["auto", "ghost", "sequential", "vmap"] = "auto"
    ascent: Literal["full", "half", "norm", "chained"] = "full"
    adaptive: bool | Literal["element", "filter", "layer"] = False
    every: int = 1
    bn: Literal["first", "both", "frozen"] = "first"
    rng: Literal["same", "independent"] = "same"
    clip_norm: float | None = None
    shard_weight: Callable[[Any], float] | None = None
    reduction: Literal["mean", "sum"] = "mean"
    check_finite: bool = True

    def __post_init__(self) -> None:
        check_micro_batches(self.num_micro_batches, self.micro_batch_size)
        if not callable(self.rho) and self.rho != "auto":
            check_number("rho", self.rho, low=0.0, high=math.inf, open_high=True)
        check_choice("mode", self.mode, ("auto", "ghost", "sequential", "vmap"))
        check_choice("ascent", self.ascent, ("full", "half", "norm", "chained"))
        check_choice("adaptive", self.adaptive, (False, True, "element", "filter", "layer"))
        check_choice("bn", self.bn, ("first", "both", "frozen"))
        check_choice("rng", self.rng, ("same", "independent"))
        check_choice("reduction", self.reduction, ("mean", "sum"))
        if self.reduction == "sum" and self.shard_weight is not None:
            raise ValueError("shard_weight: weighs means over micro-batches; with reduction='sum' leave it out")
        check_number("every", self.every, low=1, integer=True)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, low=0.0, open_low=True)
        if self.shard_weight is not None and not callable(self.shard_weight):
            raise TypeError(f"shard_weight: expected a function of a micro-batch, got {self.shard_weight!r}")
        if self.mode == "vmap" and (self.ascent != "full" or self.adaptive):
            raise ValueError(
                "mode: 'vmap' goes with ascent='full' and adaptive=False only; use 'sequential' or 'ghost'"
            )
        if self.mode == "ghost" and self.scaling == "element":
            raise ValueError(
                f"mode: 'ghost' cannot scale by elements, got adaptive={self.adaptive!r}; use 'sequential' or "
                "adaptive='filter'"
            )

    @property
    def scaling(self) -> Literal["none", "element", "filter", "layer"]:
        """The scaling T of ASAM by name."""
        if self.adaptive is True:
            return "element"
        return self.adaptive or "none"

    @property
    def stateful(self) -> bool:
        """Whether a resumed run needs more than the base optimizer's state."""
        return self.every > 1 or self.ascent == "chained" or callable(self.rho)

    def radius(self, step: int, effective: int) -> float:
        """The radius at a step.

        Args:
            step: Steps done so far.
            effective: Micro-batches of one step over all processes.

        Returns:
            rho, finite and >= 0.

        Raises:
            ValueError: If a schedule returns a negative, infinite or NaN radius.
        """
        if isinstance(self.rho, str):
            return auto_rho(effective)
        if callable(self.rho):
            rho = float(self.rho(step))
            if not (math.isfinite(rho) and rho >= 0):
                raise ValueError(f"rho: expected the schedule to return a finite value >= 0, got {rho} at step {step}")
            return rho
        return float(self.rho)


def check_micro_batches(num_micro_batches: int | None, micro_batch_size: int | None) -> None:
    """Refuse both or neither of the two ways to say how a batch is split.

    Args:
        num_micro_batches: Number of micro-batches, >= 1.
        micro_batch_size: Examples per micro-batch, >= 1.

    Raises:
        ValueError: If both or neither are given, or one is below 1.
    """
    if (num_micro_batches is None) == (micro_batch_size is None):
        raise ValueError(
            "num_micro_batches, micro_batch_size: expected exactly one of the two, got "
            f"{num_micro_batches} and {micro_batch_size}"
        )
    if num_micro_batches is not None:
        check_number("num_micro_batches", num_micro_batches, low=1, integer=True)
    if micro_batch_size is not None:
        check_number("micro_batch_size", micro_batch_size, low=1, integer=True)


def auto_rho(num_micro_batches: int, rho_sam: float = RHO_SAM) -> float:
    r"""Heuristic radius for m micro-batches, $\rho_m = \rho_{SAM} / \sqrt{m}$.

    Smaller micro-batches have noisier gradients, which act like a larger radius. The rule was read off one data set
    with a grid of factor two; treat it as the place to start tuning.

    Args:
        num_micro_batches: Effective number m of micro-batches (processes times micro-batches of each).
        rho_sam: Radius that suits plain SAM (m = 1).

    Returns:
        The radius.
    """
    check_number("num_micro_batches", num_micro_batches, low=1, integer=True)
    check_number("rho_sam", rho_sam, low=0.0)
    return rho_sam / math.sqrt(num_micro_batches)
