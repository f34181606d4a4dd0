r"""How flat a minimum is: top Hessian eigenvalue, trace, and m-sharpness."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from core_tensor.checks import check_number
from core_tensor.linalg.spectrum import hessian_operator, hutchinson_trace, lanczos
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from msam.step.batches import batch_size, cut, narrow
from msam.step.perturbation import Moved, Tracked, perturbation

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Flatness:
    """A flatness report of one model on one set of examples.

    Attributes:
        loss: Mean loss L(w).
        lambda_max: Largest eigenvalue of the Hessian of L.
        residual: Residual norm of that eigenpair; lambda_max is within it of an eigenvalue.
        converged: Whether the residual passed its tolerance.
        trace: Trace of the Hessian (Hutchinson).
        trace_standard_error: Its standard error.
        sharpness: Mean over micro-batches of L_S(w + rho g_S/||g_S||) - L_S(w), the first-order m-sharpness.
        examples: Examples it was computed on.
    """

    loss: float
    lambda_max: float
    residual: float
    converged: bool
    trace: float
    trace_standard_error: float
    sharpness: float
    examples: int

    def as_dict(self) -> dict[str, Any]:
        """The figures by name.

        Returns:
            A dictionary.
        """
        return asdict(self)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; then every module gets its own mode back, frozen ones too.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def flatness(
    model: nn.Module,
    loss_fn: Loss,
    data: Any,
    *,
    rho: float = 0.05,
    micro_batch_size: int | None = None,
    examples: int = 4000,
    probes: int = 20,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> Flatness:
    """Report the flatness of a model's loss, in evaluation mode (no dropout, running statistics).

    Args:
        model: The model; the modes of its modules are put back, nothing else changes.
        loss_fn: `loss_fn(model, batch)`, the mean loss of a batch.
        data: Tree of tensors, examples first.
        rho: Radius of the sharpness, >= 0.
        micro_batch_size: Examples per micro-batch of the sharpness; all at once if None.
        examples: At most so many examples are used, the first ones.
        probes: Sign vectors of the trace estimate.
        tolerance: Relative residual of the eigenvalue.
        seed: Of the start vector and the probes.

    Returns:
        The report.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_number("rho", rho, low=0.0)
    check_number("examples", examples, low=1, integer=True)
    data = narrow(data, 0, min(examples, batch_size(data)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
            operator = hessian_operator(lambda: loss_fn(model, data), parameters)
            pairs = lanczos(operator, tolerance=tolerance, generator=generator)
            trace = hutchinson_trace(operator, probes, generator=generator)
        del operator
        sharp = sharpness(model, loss_fn, data, rho=rho, micro_batch_size=micro_batch_size or batch_size(data))
        with torch.no_grad():
            loss = float(loss_fn(model, data))
    return Flatness(
        loss, float(pairs.values[0]), float(pairs.residuals[0]), pairs.converged, trace.value, trace.standard_error,
        sharp, batch_size(data),
    )  # fmt: skip


def sharpness(model: nn.Module, loss_fn: Loss, data: Any, *, rho: float, micro_batch_size: int) -> float:
    r"""First-order m-sharpness $\frac{1}{m} \sum_j L_{S_j}(w + \rho g_j / \|g_j\|) - L_{S_j}(w)$, weighted by size.

    Args:
        model: The model, in the mode it is to be measured in.
        loss_fn: `loss_fn(model, batch)`, the mean loss of a batch.
        data: Tree of tensors, examples first.
        rho: Radius.
        micro_batch_size: Examples per micro-batch.

    Returns:
        The sharpness.
    """
    parameters = tuple(p for p in model.parameters() if p.requires_grad)
    shards, total = cut(batch_size(data), micro_batch_size=micro_batch_size), 0.0
    for part, size in zip(shards.parts(data), shards.sizes, strict=True):
        loss = loss_fn(model, part)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        moved = Moved(parameters)
        try:
            moved.move(perturbation(Tracked(parameters, (rho,) * len(parameters)), gradients)[0])
            with torch.no_grad():
                total += size / shards.total * float(loss_fn(model, part) - loss)
        finally:
            moved.restore()
    return total


def loss_slice(
    model: nn.Module, loss_fn: Loss, data: Any, *, radius: float = 1.0, points: int = 15, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The loss on a plane through the weights, spanned by two random directions with filter-normalised lengths.

    Args:
        model: The model, in evaluation mode for the time of the call.
        loss_fn: `loss_fn(model, batch)`, the mean loss of a batch.
        data: Tree of tensors, examples first.
        radius: Half the side of the square, relative to each filter's norm.
        points: Points per side.
        seed: Of the directions.

    Returns:
        Coordinates, shape (points,), and losses, shape (points, points).

    Source:
        Filter normalisation as in arXiv 1712.09913, section 4.
    """
    check_number("points", points, low=2, integer=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)

    def direction() -> list[Tensor]:
        made = []
        for p in parameters:
            d = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            dims = tuple(range(1, p.ndim))
            scale = torch.linalg.vector_norm(p.detach(), dim=dims, keepdim=True) if dims else p.detach().abs()
            made.append(d * scale / (torch.linalg.vector_norm(d, dim=dims, keepdim=True) if dims else d.abs()))
        return made

    a, b, axis = direction(), direction(), torch.linspace(-radius, radius, points)
    losses, moved = torch.empty(points, points), Moved(parameters)
    try:
        with evaluating(model), torch.no_grad():
            for i, u in enumerate(axis.tolist()):
                for j, v in enumerate(axis.tolist()):
                    moved.move([u * x + v * y for x, y in zip(a, b, strict=True)])
                    losses[i, j] = loss_fn(model, data)
                    moved.restore()
    finally:
        moved.restore()
    return axis, losses
