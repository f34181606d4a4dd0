"""What one step leaves behind for telemetry, as tensors where they were computed."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """Figures of one mSAM gradient.

    Attributes:
        mode: `"ghost"`, `"sequential"`, `"vmap"`, `"by hand"` (`ascent`/`descent`, and closures) or `"plain"` (a step
            that `every` skipped).
        rho: Radius of the step, with several that of the first perturbed parameter; 0 in a plain step.
        loss: Mean loss at the weights, scalar tensor; NaN by hand, where only the caller knows it. A chained ascent has
            no pass at the weights: this is `perturbed_loss` too.
        perturbed_loss: Mean loss at the perturbed weights, scalar tensor; equals `loss` in a plain step.
        gradient_norms: ||g_j|| (of T g_j under ASAM, of the last step's g_j in a chained ascent) of every micro-batch,
            shape (m,); empty in a plain step. By hand they include the scale of a GradScaler.
        skipped: Whether an infinite ascent gradient under a GradScaler made the step void.
        perturbation_norms: ||eps_j|| of every micro-batch, shape (m,), with ASAM or several radii; NaN where ghost mode
            has not formed them. None where they are rho, or 0 for a gradient of 0.
    """

    mode: str
    rho: float
    loss: Tensor
    perturbed_loss: Tensor
    gradient_norms: Tensor
    skipped: bool = False
    perturbation_norms: Tensor | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a logger; None for losses and perturbations that are not known (NaN).

        Returns:
            mode, rho, loss, perturbed_loss, sharpness_gap (their difference), gradient_norm and perturbation_norm
            (means over micro-batches), micro_batches, skipped.
        """
        norms = self.gradient_norms
        sizes = self.rho * (norms > 0) if self.perturbation_norms is None else self.perturbation_norms
        return {
            "mode": self.mode,
            "rho": self.rho,
            "loss": _known(self.loss),
            "perturbed_loss": _known(self.perturbed_loss),
            "sharpness_gap": _known(self.perturbed_loss - self.loss),
            "gradient_norm": float(norms.mean()) if norms.numel() else 0.0,
            "perturbation_norm": _known(sizes.double().mean()) if norms.numel() else 0.0,
            "micro_batches": norms.numel(),
            "skipped": self.skipped,
        }


def _known(value: Tensor) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number
