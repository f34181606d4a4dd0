"""What one step leaves behind for telemetry, kept as tensors so that nothing waits for the device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """Figures of one mSAM gradient.

    Attributes:
        mode: `"ghost"`, `"sequential"`, `"vmap"` or `"plain"` (a step that `every` skipped).
        rho: Radius of the step.
        loss: Mean loss at the weights, scalar tensor.
        perturbed_loss: Mean loss at the perturbed weights, scalar tensor; equals `loss` in a plain step.
        gradient_norms: ||g_j|| (of T g_j under ASAM) of every micro-batch, shape (m,); empty in a plain step.
        skipped: Whether an infinite ascent gradient under a GradScaler made the step void.
    """

    mode: str
    rho: float
    loss: Tensor
    perturbed_loss: Tensor
    gradient_norms: Tensor
    skipped: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a logger.

        Returns:
            mode, rho, loss, perturbed_loss, sharpness_gap (their difference), gradient_norm (mean over micro-batches),
            perturbation_norm (mean; 0 for a micro-batch without gradient), micro_batches.
        """
        norms = self.gradient_norms
        moved = (norms > 0).double().mean() if norms.numel() else torch.zeros(())
        return {
            "mode": self.mode,
            "rho": self.rho,
            "loss": float(self.loss),
            "perturbed_loss": float(self.perturbed_loss),
            "sharpness_gap": float(self.perturbed_loss - self.loss),
            "gradient_norm": float(norms.mean()) if norms.numel() else 0.0,
            "perturbation_norm": self.rho * float(moved),
            "micro_batches": norms.numel(),
            "skipped": self.skipped,
        }
