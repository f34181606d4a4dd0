r"""Losses that are sums over samples, and the factors of their curvature in the network's outputs.

Symbols: z_i = f(x_i; w) the outputs of sample i, flattened to O numbers; J_i its Jacobian (O, d); Lambda_i the Hessian
of the loss in z_i, Lambda_i = W_i diag(signs_i) W_i' with W_i (O, R). The Gauss-Newton Hessian of sample i is then
H_i = Z_i' diag(signs_i) Z_i with Z_i = W_i' J_i (R, d). Training minimises the mean over samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from core_tensor.checks import check_tensor
from torch import Tensor
from torch.nn import functional as F

LossValues = Callable[[Tensor, Tensor], Tensor]


class OutputFactor(Protocol):
    """W_i for every sample of a batch."""

    @property
    def rank(self) -> int:
        """R, the number of columns of every W_i."""

    @property
    def signs(self) -> Tensor | None:
        """Signs of the columns, shape (n, R); None if Lambda_i is positive semidefinite."""

    def transpose_times(self, x: Tensor) -> Tensor:
        """Multiply by W_i'.

        Args:
            x: Shape (n, O, k).

        Returns:
            W_i' x_i, shape (n, R, k).
        """

    def times(self, u: Tensor) -> Tensor:
        """Multiply by W_i.

        Args:
            u: Shape (n, R, k).

        Returns:
            W_i u_i, shape (n, O, k).
        """


@dataclass(frozen=True)
class ScaledIdentity:
    """W_i = sqrt(scale) I, of the squared error.

    Attributes:
        scale: Lambda_i = scale I.
        rank: O.
        signs: None.
    """

    scale: float
    rank: int
    signs: None = None

    def transpose_times(self, x: Tensor) -> Tensor:
        """See `OutputFactor.transpose_times`.

        Args:
            x: Shape (n, O, k).

        Returns:
            Shape (n, R, k).
        """
        scaled: Tensor = x * self.scale**0.5
        return scaled

    times = transpose_times


@dataclass(frozen=True)
class SoftmaxFactor:
    """W = diag(sqrt p) (I - sqrt p sqrt p') at every position: W W' = diag(p) - p p' (cross-entropy).

    Attributes:
        root: sqrt p with the weight of a position in it, shape (n, V, P).
        unit: sqrt p, shape (n, V, P).
        signs: None.
    """

    root: Tensor
    unit: Tensor
    signs: None = None

    @property
    def rank(self) -> int:
        """V P."""
        return self.root.shape[1] * self.root.shape[2]

    def transpose_times(self, x: Tensor) -> Tensor:
        """See `OutputFactor.transpose_times`.

        Args:
            x: Shape (n, O, k).

        Returns:
            Shape (n, R, k).
        """
        y = self.root[..., None] * x.reshape(*self.root.shape, -1)  # (n, V, P, k)
        y = y - self.unit[..., None] * (self.unit[..., None] * y).sum(1, keepdim=True)
        return y.reshape(x.shape)

    def times(self, u: Tensor) -> Tensor:
        """See `OutputFactor.times`.

        Args:
            u: Shape (n, R, k).

        Returns:
            Shape (n, O, k).
        """
        y = u.reshape(*self.root.shape, -1)
        y = y - self.unit[..., None] * (self.unit[..., None] * y).sum(1, keepdim=True)
        return (self.root[..., None] * y).reshape(u.shape)


@dataclass(frozen=True)
class DenseFactor:
    """W_i as matrices, of a loss whose output Hessian autograd supplies.

    Attributes:
        W: Shape (n, O, R).
        signs: Shape (n, R), or None.
    """

    W: Tensor
    signs: Tensor | None

    @property
    def rank(self) -> int:
        """R."""
        return int(self.W.shape[2])

    def transpose_times(self, x: Tensor) -> Tensor:
        """See `OutputFactor.transpose_times`.

        Args:
            x: Shape (n, O, k).

        Returns:
            Shape (n, R, k).
        """
        return self.W.mT @ x

    def times(self, u: Tensor) -> Tensor:
        """See `OutputFactor.times`.

        Args:
            u: Shape (n, R, k).

        Returns:
            Shape (n, O, k).
        """
        return self.W @ u


@dataclass(frozen=True)
class SampleLoss:
    """A loss that is a sum over samples.

    Attributes:
        name: For messages and reports.
        values: `(outputs (n, ...), targets) -> losses (n,)`.
        factor: `(outputs, targets) -> OutputFactor`.
    """

    name: str
    values: LossValues
    factor: Callable[[Tensor, Tensor], OutputFactor]


def resolve_loss(loss: str | torch.nn.Module | LossValues) -> SampleLoss:
    """Understand what the caller trains with.

    Args:
        loss: `"squared_error"`, that is ||z - y||^2 / 2 per sample; `"mse"`, torch's mean of squares over the outputs;
            `"cross_entropy"` in torch's layout (n, V, ...), the mean over positions; an `nn.MSELoss` or
            `nn.CrossEntropyLoss`; or a function `(outputs, targets) -> per-sample losses (n,)`.

    Returns:
        The loss.

    Raises:
        ValueError: If the loss is unknown, or its reduction over the batch is not the mean.
        TypeError: If it is neither a name nor callable.
    """
    if isinstance(loss, str):
        known = {
            "squared_error": SampleLoss("squared_error", _half_squares, lambda z, _: ScaledIdentity(1.0, _outputs(z))),
            "mse": SampleLoss("mse", _mean_squares, lambda z, _: ScaledIdentity(2.0 / _outputs(z), _outputs(z))),
            "cross_entropy": SampleLoss("cross_entropy", _cross_entropy(0.0), lambda z, _: _softmax_factor(z)),
        }
        if loss not in known:
            raise ValueError(f"loss: expected one of {', '.join(map(repr, known))} or a function, got {loss!r}")
        return known[loss]
    if isinstance(loss, torch.nn.MSELoss | torch.nn.CrossEntropyLoss):
        return _resolve_module(loss)
    if not callable(loss):
        raise TypeError(f"loss: expected a name, a torch loss or a function, got {type(loss).__name__}")
    values: LossValues = loss
    name = getattr(loss, "__name__", type(loss).__name__)
    return SampleLoss(name, lambda z, y: _checked(values, z, y), lambda z, y: _dense_factor(values, z, y))


def _resolve_module(loss: torch.nn.MSELoss | torch.nn.CrossEntropyLoss) -> SampleLoss:
    if loss.reduction != "mean":
        raise ValueError(
            f"loss: expected reduction='mean' (the step divides by the batch size), got {loss.reduction!r}; for other "
            "reductions pass a function that returns one loss per sample and rescale the learning rate"
        )
    if isinstance(loss, torch.nn.MSELoss):
        return resolve_loss("mse")
    if loss.weight is not None:
        raise ValueError("loss: expected no class weights (torch divides by the batch's sum of weights), got some")
    values = _cross_entropy(loss.label_smoothing)
    return SampleLoss("cross_entropy", values, lambda z, _: _softmax_factor(z))


def check_additive(loss: SampleLoss, outputs: Tensor, targets: Tensor) -> None:
    """Refuse a loss of one sample that depends on which others are in the batch, and one that is not finite.

    Args:
        loss: The loss.
        outputs: Outputs, shape (n, ...).
        targets: Targets, n along the first dimension.

    Raises:
        ValueError: If it is not a sum over samples or not finite.
    """
    if loss.name == "cross_entropy" and not targets.is_floating_point() and bool((targets < 0).any()):
        raise ValueError("targets: expected class indices without ignored ones (negative), got some")
    together = loss.values(outputs, targets)
    if not bool(together.isfinite().all()):
        raise ValueError(f"loss: expected finite losses, got {int((~together.isfinite()).sum())} NaN or infinite")
    half = (len(outputs) + 1) // 2
    alone = loss.values(outputs[:half], targets[:half])
    slack = 1e-4 * (together.abs().max() + 1e-6)
    if bool(((together[:half] - alone).abs() > slack).any()):
        raise ValueError(f"loss: expected a sum over samples, but {loss.name} of a sample changes with its batch")


def _outputs(z: Tensor) -> int:
    return z[0].numel()


def _half_squares(z: Tensor, y: Tensor) -> Tensor:
    _check_same("squared error", z, y)
    return (z - y).square().flatten(1).sum(1) / 2


def _mean_squares(z: Tensor, y: Tensor) -> Tensor:
    _check_same("mean squared error", z, y)
    return (z - y).square().flatten(1).mean(1)


def _check_same(name: str, z: Tensor, y: Tensor) -> None:
    if z.shape != y.shape:  # broadcasting would silently compare every output with every target
        raise ValueError(f"targets: expected shape {tuple(z.shape)}, the outputs', for {name}, got {tuple(y.shape)}")


def _cross_entropy(smoothing: float) -> LossValues:
    def values(z: Tensor, y: Tensor) -> Tensor:
        check_tensor("outputs", z)
        if z.ndim < 2:
            raise ValueError(f"outputs: expected shape (n, classes, ...) for cross-entropy, got {tuple(z.shape)}")
        losses = F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing)
        return losses.reshape(len(z), -1).mean(1)

    return values


def _softmax_factor(z: Tensor) -> SoftmaxFactor:
    unit = z.detach().reshape(z.shape[0], z.shape[1], -1).softmax(1).sqrt()  # (n, V, P)
    return SoftmaxFactor(unit / unit.shape[2] ** 0.5, unit)


def _checked(loss: LossValues, z: Tensor, y: Tensor) -> Tensor:
    values = loss(z, y)
    check_tensor("loss", values)
    if values.shape != (len(z),):
        raise ValueError(f"loss: expected one loss per sample, shape ({len(z)},), got {tuple(values.shape)}")
    return values


def _dense_factor(loss: LossValues, z: Tensor, y: Tensor) -> DenseFactor:
    # The loss is a sum over samples, so O double backward passes give the output Hessians of all samples at once.
    flat = z.detach().reshape(len(z), -1).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss(flat.reshape(z.shape), y).sum(), flat, create_graph=True)
        rows = [_gradient(slope[:, o].sum(), flat) for o in range(flat.shape[1])]
    hessian = torch.stack(rows, 1)  # (n, O, O)
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    noise = 10 * torch.finfo(z.dtype).eps * values.abs().amax(1, keepdim=True)
    values = torch.where(values.abs() <= noise, 0.0, values)
    signs = None if bool((values >= 0).all()) else torch.sign(values)
    return DenseFactor(vectors * values.abs().sqrt()[:, None, :], signs)


def _gradient(value: Tensor, by: Tensor) -> Tensor:
    if not value.requires_grad:  # a loss linear in this output
        return torch.zeros_like(by)
    (found,) = torch.autograd.grad(value, by, retain_graph=True, materialize_grads=True)
    return found.detach()
