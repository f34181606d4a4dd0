r"""The perturbation itself, $\epsilon_j = \rho\, T^2 g_j / \|T g_j\|$ with T = 1 outside ASAM, and undoing it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ASAM_ETA = 0.01
"""Added to |w| in the scalings of ASAM (arXiv 2102.11600, section 4), so that zero weights move too."""


@dataclass(frozen=True)
class Tracked:
    """Parameters that are perturbed.

    Attributes:
        parameters: The tensors w.
        radii: Radius rho of each tensor's parameter group.
        scaling: `"none"`, or ASAM's T by `"element"`, `"filter"` or `"layer"`.
    """

    parameters: tuple[Tensor, ...]
    radii: tuple[float, ...]
    scaling: str = "none"

    @property
    def uniform(self) -> bool:
        """Whether every perturbation has the norm rho: one radius, and no scaling."""
        return self.scaling == "none" and self.radii.count(self.radii[0]) == len(self.radii)

    def shrunk(self) -> "Tracked":
        """The same with radii below all rounding, which takes an engine the very way that its perturbations take.

        Returns:
            A copy.
        """
        return replace(self, radii=tuple(1e-20 * r for r in self.radii))


def scale_of(parameter: Tensor, scaling: str) -> Tensor:
    """ASAM's T for one parameter.

    Args:
        parameter: Weights w, shape (d_0, d_1, ...).
        scaling: `"element"`: |w|; `"filter"`: norm of each slice w[i]; `"layer"`: norm of w.

    Returns:
        T, broadcastable to w's shape.
    """
    w = parameter.detach()
    scale: Tensor
    if scaling == "layer":
        scale = torch.linalg.vector_norm(w) + ASAM_ETA
    elif scaling == "filter" and w.ndim > 1:
        scale = torch.linalg.vector_norm(w, dim=tuple(range(1, w.ndim)), keepdim=True) + ASAM_ETA
    else:
        scale = w.abs() + ASAM_ETA
    return scale


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all elements of all tensors.

    Args:
        tensors: Any shapes, at least one tensor.

    Returns:
        Scalar tensor.
    """
    norms = torch._foreach_norm(list(tensors))
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return norm


def perturbation(tracked: Tracked, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Tensor]:
    """The step to the worst point of the neighbourhood, in first order. The gradients are overwritten.

    Args:
        tracked: Parameters with radii and scaling.
        gradients: Their gradients g (any positive scale), or None where there is none.

    Returns:
        The perturbations, and the norm of T g (scalar tensor). A zero gradient gives a zero perturbation.
    """
    there = [i for i, g in enumerate(gradients) if g is not None]
    if not there:
        return [None] * len(gradients), torch.zeros(())
    g = [gradient for gradient in gradients if gradient is not None]
    scales = [scale_of(tracked.parameters[i], tracked.scaling) for i in there] if tracked.scaling != "none" else []
    if scales:
        torch._foreach_mul_(g, scales)
    norm = norm_of(g)
    if scales:
        torch._foreach_mul_(g, scales)
    size = float(norm)  # one synchronisation per micro-batch; the branch below must not divide by zero
    torch._foreach_mul_(g, [tracked.radii[i] / size if size > 0 else 0.0 for i in there])
    steps: list[Tensor | None] = [None] * len(gradients)
    for i, step in zip(there, g, strict=True):
        steps[i] = step
    return steps, norm


def size_of(steps: Sequence[Tensor | None]) -> Tensor:
    """The norm of a perturbation.

    Args:
        steps: One per parameter, or None.

    Returns:
        ||eps||, scalar tensor.
    """
    there = [step for step in steps if step is not None]
    return norm_of(there) if there else torch.zeros(())


class Moved:
    """Weights that can be moved by a perturbation and are put back bit for bit.

    Args:
        parameters: The weights.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._saved: list[Tensor] | None = None
        self.moved = False

    @torch.no_grad()
    def move(self, steps: Sequence[Tensor | None]) -> None:
        """Add a perturbation; the weights before it are kept (one copy, shared by all micro-batches of a step).

        Args:
            steps: One perturbation per parameter, or None.
        """
        if self._saved is None:
            self._saved = [p.detach().clone() for p in self._parameters]
        there = [(p, s) for p, s in zip(self._parameters, steps, strict=True) if s is not None]
        self.moved = True
        if there:
            torch._foreach_add_([p for p, _ in there], [s for _, s in there])

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back exactly (a copy; subtracting would leave rounding errors)."""
        if self.moved and self._saved is not None:
            torch._foreach_copy_(self._parameters, self._saved)
        self.moved = False


@contextmanager
def moved(parameters: Sequence[Tensor], steps: Sequence[Tensor | None]) -> Iterator[None]:
    """Weights at w + eps inside a block.

    Args:
        parameters: The weights w.
        steps: One perturbation per parameter, or None.

    Yields:
        Nothing.
    """
    weights = Moved(parameters)
    try:
        weights.move(steps)
        yield
    finally:
        weights.restore()
